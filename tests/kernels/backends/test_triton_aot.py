"""That every Triton kernel compiles for every architecture, without spilling registers and with its matrix instructions."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def configuration(row: str) -> list[str]:
    """What of a table's row does not depend on the compiler's version."""
    return row.split(" | ")[:7] if row.startswith("| ") else []


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_configuration_compiles_without_spills(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.triton_aot", str(tmp_path / "table.md")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert {row.split(" | ")[0] for row in rows if row.startswith("| 8.0") or row.startswith("| 9.0")} == {
        "| 8.0",
        "| 9.0",
    }
    committed = (Path(__file__).parents[3] / "bench/results/triton_aot.md").read_text().splitlines()
    assert [configuration(row) for row in rows] == [configuration(row) for row in committed], "run `make aot`"
    assert any("tcgen05.mma" in row for row in rows if row.startswith("| 10.0"))
    assert any("wgmma" in row for row in rows if row.startswith("| 9.0"))
