"""The head's benchmark: that a case is measured in a process of its own, and that one which fails is a row of the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import table
from bench.ways import FLOOR, ONE_PRODUCT, SCORING
from bench.worker import Worker, WorkerFailed


@pytest.mark.parametrize("way", [FLOOR, "tbrm: single pass", ONE_PRODUCT, SCORING])
def test_a_case_is_checked_and_measured(way: str) -> None:
    with Worker(way, "4096", "1024", "float32") as worker:
        errors = worker.ask("check")
        assert set(errors) == (
            {"error_loss", "error_hidden", "error_weight"} if way.startswith("tbrm: single") else set()
        )
        assert worker.ask("small_step")["seconds"] > 0
        worker.ask("prepare")
        peaks = [worker.ask("step")["peak_mib"] for _ in range(2)]
    logits, weight, hidden = (size / 2**18 for size in (4096 * 1024, 4096 * 896, 1024 * 896))
    least = {FLOOR: logits, ONE_PRODUCT: logits, SCORING: 0}.get(way, weight + hidden)
    assert least <= peaks[0] < 60
    assert peaks[1] >= peaks[0]


def test_a_case_that_takes_too_much_memory_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.worker.SPARE_MIB", 2**40)
    with (
        Worker("torch, eager", "4096", "1024", "float32") as worker,
        pytest.raises(WorkerFailed, match="out of memory"),
    ):
        worker.ask("check")


def test_what_a_case_died_of_is_said() -> None:
    with (
        Worker("no such way", "64", "4", "no such dtype") as worker,
        pytest.raises(WorkerFailed, match="no such dtype"),
    ):
        worker.ask("check")


def test_the_table_and_the_plots_show_failures_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(way: str, seconds: float) -> dict[str, Any]:
        case = {"way": way, "vocab": 64, "tokens": 4, "dtype": "float32", "peak_mib": 3.0}
        least = seconds / (2 if way == FLOOR else 4)
        return {"extra_info": case, "stats": {"median": seconds, "min": least, "rounds": 7}}

    failure = {
        "way": "TRL kernels",
        "vocab": 64,
        "tokens": 4,
        "dtype": "float32",
        "note": "out of memory: above 17 GiB",
    }
    results = {
        "benchmarks": [measured("tbrm: single pass", 1.0), measured(FLOOR, 2.0)],
        "failures": [failure],
        "machine_info": {"cpu": {"brand_raw": "a processor"}, "torch": "2 threads"},
    }
    (tmp_path / "bench.json").write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "bench.json"), str(tmp_path / "results")])
    table.main()
    text = (tmp_path / "results/trajectory_loss.md").read_text()
    assert "a processor (2 threads)" in text
    assert "| tbrm: single pass | 1000 | 7 | 0.50 | 0.25 | 3 |" in text
    assert "| TRL kernels (out of memory: above 17 GiB) |  |" in text
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "trajectory_loss.md",
        "trajectory_loss.csv",
        "time.png",
        "memory.png",
    }
