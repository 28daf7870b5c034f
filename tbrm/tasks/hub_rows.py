"""Data sets of a hub: the files that `datasets` makes of them, once, in its cache."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

PREFIX = "hub:"


@cache
def hub_files(path: str) -> tuple[Path, ...]:
    """The Arrow files of `hub:NAME[:CONFIG[:SPLIT]]`; the only configuration and the split train where none is named.

    Without a network they are found if they were there before. Raises ValueError.
    """
    name, config, split, *rest = (*path.removeprefix(PREFIX).split(":"), *[""] * 2)
    if not name or any(rest):
        raise ValueError(
            f"{path}: wants hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT, such as hub:openai/gsm8k:main:test"
        )
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"{path}: data sets of a hub need the package datasets: pip install 'tbrm[hub]'")
    import datasets

    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path}: {error}") from error
    return tuple(Path(each["filename"]) for each in rows.cache_files)
