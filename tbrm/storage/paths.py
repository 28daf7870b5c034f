"""Paths as people write them in recipes and on the command line, where no shell reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|(\w+))")


def expand(path: str) -> str:
    """With `~` and $VARIABLES replaced. Raises ValueError for one that is not set, rather than make a folder of its name."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2] or ""
        if name not in os.environ:
            raise ValueError(
                f"{path!r} names the environment variable {name!r}, which is not set: set it, or write it out"
            )
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value, path))
    if expanded.startswith("~"):
        raise ValueError(
            f"{path!r}: there is no home of {expanded.split('/')[0]!r}; write ./{expanded} for a name with ~"
        )
    return expanded


def is_path(model: str) -> bool:
    """Whether a model's name means a folder, there or not, and no hub's `owner/name`."""
    looks_like_one = model.startswith((".", "/", "~", "runs/")) or model.count("/") > 1
    return looks_like_one or Path(model).exists() or ("/" in model and Path(model).parent.is_dir())
