"""`python -m tbrm`, so that torchrun can start it: `torchrun ... -m tbrm train recipes/NAME.yaml`."""

from tbrm.commands.cli import main

raise SystemExit(main())
