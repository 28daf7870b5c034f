"""Rows of data files as people have them: which files there are, and one row after the other of each."""

from __future__ import annotations

import glob
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tbrm.tasks.hub_rows import PREFIX, hub_files
from tbrm.tasks.row_formats import FORMATS, Row, need_pyarrow, read_saved_dataset

KINDS = f"files end in {', '.join(FORMATS)}, each also with .gz or .zst"


def find_files(paths: str | Sequence[str]) -> list[Path]:
    """The files of one or several paths, in their order; a pattern with *, ? or [ stands for all that match, sorted, and
    hub:NAME for what `datasets` has of a hub's data set.

    Raises ValueError for what is not there.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if path.startswith(PREFIX):
            found += hub_files(path)
            continue
        matches = [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
        if not matches:
            what = "no file matches" if glob.has_magic(path) else "no such file"
            raise ValueError(f"{path}: {what} (relative paths start at {Path.cwd()})")
        found += map(Path, matches)
    if not found:
        raise ValueError("path: no file is given")
    return found


def read_rows(paths: str | Sequence[str]) -> Iterator[tuple[str, Row]]:
    """The rows of all the files, each with its place, "FILE:LINE" (a row's number, from 1, where a format has no lines).

    A file is JSON Lines, a JSON array, CSV with a header, or Parquet, as its name ends, and may be compressed; a folder is what
    `datasets` saved to disk. Little more than a row at a time is held, but of a JSON array. Raises ValueError, with the place,
    for what cannot be read, and for a file without rows.
    """
    for path in find_files(paths):
        empty = True
        for number, row in _rows(path):
            empty = False
            yield f"{path}:{number}", row
        if empty:
            raise ValueError(f"{path}: the file has no rows")


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    if path.is_dir():
        yield from read_saved_dataset(path)
        return
    packed = path.suffix in (".gz", ".zst")
    suffix = Path(path.stem).suffix if packed else path.suffix
    if suffix not in FORMATS:
        raise ValueError(f"{path}: {KINDS}")
    number = 0
    try:
        with _open(path) as file:
            for number, row in FORMATS[suffix](path, file):
                yield number, row
    except (OSError, EOFError, zlib.error) as error:  # what is packed may be cut off or broken
        raise ValueError(f"{path}: cannot be read after row {number}: {error}") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix == ".zst":
        stream: Any = need_pyarrow(path).input_stream(str(path), compression="zstd")
        return io.BufferedReader(stream)
    return path.open("rb")
