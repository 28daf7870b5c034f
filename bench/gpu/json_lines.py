"""Files of JSON lines: a stage that is stopped keeps the lines that it has written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
    """In one write, so that several processes may write to one file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(file, (json.dumps(row) + "\n").encode())
    os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """Of a stage that has not run: no rows. What follows the last newline was cut off."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
