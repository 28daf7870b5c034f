"""Reading rows from JSON Lines and Parquet files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .jsonl or .parquet file, each with its number: from 1, lines for JSON Lines, rows for Parquet.

    Raises ValueError, naming the file and the line, for a file or line that cannot be read, and for a file of no rows.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path}: files of problems end in .jsonl or .parquet")
    if not path.is_file():
        raise ValueError(f"{path}: no such file (relative paths start at {Path.cwd()})")
    empty = True
    for row in readers[path.suffix](path):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{path}: the file has no rows")


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # also that of bytes that are no UTF-8
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a line is one JSON object, got {row!r:.100}")
            yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: Parquet files need the package pyarrow: pip install 'tbrm[parquet]'")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    yield from enumerate(table.to_pylist(), start=1)
