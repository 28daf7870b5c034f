"""`bench/gpu.sh`: all its stages run on the CPU, from a bare copy of the tree; and what one of them cannot lose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import head, table
from bench.gpu.cells import TINY, Cell, cells
from bench.gpu.json_lines import append, read
from bench.ways import FLOOR, ONE_PRODUCT

ROOT = Path(__file__).parents[2]
FILES = (
    "card.jsonl",
    "tests.jsonl",
    "head.jsonl",
    "trainer.jsonl",
    "profile.txt",
    "trace.json.gz",
    "tables.md",
    "log.txt",
)


@pytest.fixture
def bare_copy(tmp_path: Path) -> Path:
    """As `git archive` would write it, uncommitted changes included."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    copy = tmp_path / "tree"
    for name in listed.stdout.decode().split("\0")[:-1]:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def test_every_stage_runs_from_a_bare_copy_of_the_tree(bare_copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "--dry-run"],
        cwd=bare_copy,
        env={**environment, "OUT": str(out), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log
    stages = ("card", "tests", "head", "trainer", "profile", "attention", "sdpa", "compiled")
    assert [line.split()[1] for line in log.splitlines() if "exit status 0" in line] == [
        f"{name}:" for name in stages
    ], log
    assert {path.name for path in out.iterdir()} == set(FILES)

    of_kernels = [row for row in read(out / "tests.jsonl") if row["test"].startswith("tests/kernels")]
    assert of_kernels and {row["outcome"] for row in of_kernels} <= {"passed", "skipped"}
    rows = {(row["what"], row["head"], row["way"]): row for row in read(out / "head.jsonl")}
    assert set(rows) == {(cell.what, cell.head.name, cell.way) for cell in cells(TINY)}
    for (what, _, way), row in rows.items():
        if way.startswith(("tbrm", "floor", "torch")):
            assert row["over_floor"] > 0 if what == "time" else 0 < row["error_weight"] < 0.01, row
    steps = [row for row in read(out / "trainer.jsonl") if row["what"] == "step"]
    assert {row["case"] for row in steps} == {"default", "model.attention=sdpa", "model.compile=true"}
    assert all(row["seconds/update"] > 0 and not row["skipped"] for row in steps)
    assert "Self CPU" in (out / "profile.txt").read_text()

    text = (out / "tables.md").read_text()
    assert text in done.stdout
    for part in (
        "what it is",
        "tests of the kernels",
        "a tiny model, V = 777",
        "a training step, default",
        "planned_mib",
    ):
        assert part in text


def test_what_takes_the_process_with_it_is_a_row_and_the_next_process_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = (FLOOR, "tbrm: single pass", ONE_PRODUCT, "no such way")
    monkeypatch.setattr(head, "cells", lambda heads: [Cell("time", heads[0], way) for way in ways])

    def dies(self: head.Measurement, cell: Cell) -> dict[str, float]:
        if cell.way == "tbrm: single pass":
            raise KeyboardInterrupt
        return {"over_floor": 1.25}

    monkeypatch.setattr(head.Measurement, "time", dies)
    with pytest.raises(KeyboardInterrupt):
        head.main(tmp_path / "head.jsonl")
    monkeypatch.undo()
    monkeypatch.setattr(head, "cells", lambda heads: [Cell("time", heads[0], way) for way in ways])
    assert head.main(tmp_path / "head.jsonl") == 0
    assert [row["way"] for row in read(tmp_path / "head.jsonl")] == [FLOOR] * 2 + [ways[1]] + [ONE_PRODUCT] * 2 + [
        ways[3]
    ] * 2

    append(tmp_path / "card.jsonl", {"what": "card", "value": "a card"})
    table.main(tmp_path, tmp_path / "tables.md")
    text = (tmp_path / "tables.md").read_text()
    assert "## a card: the head of a tiny model" in text
    assert f"| {FLOOR} | 1.25 |" in text
    assert "time: begun, and took the process with it |" in text
    assert "time: KeyError: 'no such way' |" in text
    assert "none ended" in text
