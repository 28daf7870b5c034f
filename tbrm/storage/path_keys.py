"""The type of a recipe's keys that hold a path. (In a file of its own: `tbrm --help` wants `expand`, and no pydantic.)"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from tbrm.storage.paths import expand

ExpandedPath = Annotated[str, AfterValidator(expand)]
"""Of every key that holds a path, or may."""
