"""One reader for each format of rows: of a file that is open, (number, row) for each row."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]

_BATCH = 1000
"""Rows of Parquet or Arrow that are made Python objects at a time."""


def _read_jsonl(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _json_row(path, number, _loads(path, number, line))


def _read_json(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    rows = _loads(path, 1, file.read())
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a .json file is an array of rows, got {rows!r:.100}; one object a line is .jsonl")
    for number, row in enumerate(rows, start=1):
        yield number, _json_row(path, number, row)


def _loads(path: Path, number: int, text: bytes) -> Any:
    try:
        value = json.loads(text)
        if b"\\ud" in text.lower():  # half of a surrogate pair is JSON, and no text
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}:{number}: half of a surrogate pair, {error.object[error.start]!r}, is no text"
        ) from error
    except ValueError as error:  # also that of bytes that are no UTF-8
        raise ValueError(f"{path}:{number}: not JSON: {error}") from error
    return value


def _json_row(path: Path, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{number}: a row is one JSON object, got {row!r:.100}")
    return row


def _read_csv(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                given = len(row) + len(row.get(None) or ()) - (None in row) - list(row.values()).count(None)
                raise ValueError(f"{given} fields, and the header has {len(rows.fieldnames or ())}")
            yield rows.line_num, dict(row)
    except (ValueError, csv.Error) as error:  # also bytes that are no UTF-8
        raise ValueError(f"{path}:{max(rows.line_num, 1)}: not CSV: {error}") from error


def _read_parquet(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    pyarrow = need_pyarrow(path)
    import pyarrow.parquet as parquet

    try:
        source = parquet.ParquetFile(file if file.seekable() else io.BytesIO(file.read()))
        yield from _numbered(source.iter_batches(_BATCH))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error


def read_saved_dataset(path: Path) -> Iterator[tuple[int, Row]]:
    """Of a folder that `datasets` saved to disk (Dataset.save_to_disk)."""
    files = sorted(path.glob("*.arrow"))
    splits = sorted(each.name for each in path.iterdir() if list(each.glob("*.arrow")))
    if not files and splits:
        raise ValueError(f"{path}: a data set of the splits {', '.join(splits)}: name one, {path / splits[0]}")
    if not files:
        raise ValueError(f"{path}: a folder without *.arrow, so none that datasets saved to disk")
    yield from _numbered(batch for each in files for batch in _batches(each))


def _read_arrow(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    yield from _numbered(_batches(path))


def _batches(path: Path) -> Iterator[Any]:
    pyarrow = need_pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            for batch in pyarrow.ipc.open_stream(source):
                for start in range(0, batch.num_rows, _BATCH):
                    yield batch.slice(start, _BATCH)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not what datasets saves to disk: {error}") from error


def _numbered(batches: Iterable[Any]) -> Iterator[tuple[int, Row]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


def need_pyarrow(path: Path) -> Any:
    """The package. Raises ValueError where it is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: such files need the package pyarrow: pip install 'tbrm[parquet]'")
    import pyarrow

    return pyarrow


FORMATS: dict[str, Callable[[Path, IO[bytes]], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
