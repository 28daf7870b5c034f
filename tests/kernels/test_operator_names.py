"""What the kernels' operators are called in torch's registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_folder_imported_by_its_own_name_redefines_no_operator() -> None:
    """As transformers does from the root of this repository, in search of another package called `kernels`; an operator that is
    defined again leaves the first one's handle pointing at nothing."""
    code = (
        "import tbrm_kernels.tbrm_loss as ours, kernels.tbrm_loss as again; "
        "import tbrm_kernels.token_stats_op as stats, kernels.token_stats_op as stats_again; "
        "ops = [x.tbrm_loss_op for x in (ours, again)]; "
        "ops += [getattr(x, n) for x in (stats, stats_again) for n in ('token_stats_op', 'token_stats_backward_op')]; "
        "print(len(ops), len({op._opoverload.name() for op in ops}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["6", "6"], done.stdout + done.stderr
