"""The run's log files, phase timer and memory reading."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tbrm.reporting.metrics import MetricsLog, Phases, is_timing, peak_memory_mib, read_jsonl

CPU = torch.device("cpu")


def metrics_of(step: int) -> dict[str, float]:
    return {"loss": 1.5 * step, "reward_mean": 0.25 * step, "seconds/rollout": 2.0}


def run(run_dir: Path, first: int, last: int, resume_step: int | None = None) -> None:
    """Updates `first` to `last`, with an evaluation after every second one, and before any."""
    with MetricsLog(run_dir, resume_step=resume_step) as log:
        if first == 1:
            log.log_eval(0, {"accuracy": 0.0})
        for step in range(first, last + 1):
            log.log(step, metrics_of(step))
            if step % 2 == 0:
                log.log_eval(step, {"accuracy": step / 100})
    # TensorBoard reads files in the order of the second in their names, and these runs are all of one second.
    for number, file in enumerate(
        sorted((run_dir / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    ):
        file.rename(file.with_name(f"events.out.tfevents.{number}"))


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_are_on_disk_at_once_with_keys_in_the_order_given(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, {"loss": 2.0, "objective": "tbrm", "aardvark": 3})
    log.log_eval(1, {"accuracy": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0, "objective": "tbrm", "aardvark": 3}\n'
    assert (tmp_path / "eval.jsonl").read_text() == '{"step": 1, "accuracy": 0.5}\n'
    log.close()


def test_what_json_lacks_is_null_and_reaches_tensorboard_as_it_is(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": math.nan, "up": math.inf, "down": -math.inf})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "up": None,
        "down": None,
    }
    assert math.isnan(scalars(tmp_path, "train/loss")[0][1])
    assert scalars(tmp_path, "train/up") == [(1, math.inf)]


def test_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(TypeError, match=r"'grad_norm' is tensor.*give a Python number"):
        log.log(1, {"loss": 1.0, "grad_norm": torch.ones(())})  # type: ignore[dict-item]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_groups_the_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": 2.0, "seconds/update": 4.0, "objective": "tbrm"})
        log.log_eval(0, {"accuracy": 0.25})
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert sorted(tags) == ["eval/accuracy", "seconds/update", "train/loss"]


def test_a_resumed_run_ends_with_the_files_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, 1, 8)
    run(killed, 1, 6)  # goes on past its last checkpoint, at step 4 ...
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # ... and is killed in the middle of a line
    run(killed, 5, 8, resume_step=4)

    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    for tag in ("train/loss", "eval/accuracy"):
        assert scalars(killed, tag) == scalars(whole, tag)
    assert {path.name for path in killed.iterdir()} == {"metrics.jsonl", "eval.jsonl", "tensorboard"}


def test_resuming_before_the_first_step_keeps_only_the_evaluation_of_the_untrained_model(tmp_path: Path) -> None:
    run(tmp_path, 1, 4)
    MetricsLog(tmp_path, resume_step=0).close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == []
    assert read_jsonl(tmp_path / "eval.jsonl") == [{"step": 0, "accuracy": 0.0}]


def test_a_fresh_run_starts_its_files_afresh(tmp_path: Path) -> None:
    run(tmp_path, 1, 6)
    run(tmp_path, 1, 2)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in read_jsonl(tmp_path / "eval.jsonl")] == [0, 2]
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2]


@settings(max_examples=50)
@given(rows=st.lists(st.dictionaries(st.text(), st.integers() | st.text()), min_size=1, max_size=4), data=st.data())
def test_a_file_cut_anywhere_reads_as_its_whole_lines(tmp_path_factory, rows, data) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    cut = data.draw(st.integers(0, len(text)))
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(text[:cut])
    assert read_jsonl(path) == rows[: text[:cut].count(b"\n")]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON"):
        MetricsLog(tmp_path, resume_step=3)


def test_wandb_that_is_not_installed_is_named_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does to a module that must not be imported
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tbrm\[wandb\]'"):
        MetricsLog(tmp_path, wandb=True)
    assert list(tmp_path.iterdir()) == []


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricsLog(tmp_path, wandb=True, config={"seed": 0}) as log:
        log.log(1, metrics_of(1))
    first_id = (tmp_path / "wandb_id.txt").read_text()
    with MetricsLog(tmp_path, wandb=True, resume_step=1) as log:
        log.log(2, metrics_of(2))
    assert (tmp_path / "wandb_id.txt").read_text() == first_id
    MetricsLog(tmp_path, wandb=True).close()
    assert (tmp_path / "wandb_id.txt").read_text() != first_id


def test_only_times_and_memory_may_differ_between_equal_runs() -> None:
    assert all(is_timing(key) for key in ("seconds/rollout", "tokens_per_second", "peak_memory_mib"))
    assert not any(is_timing(key) for key in ("step", "loss", "reward_mean", "learning_rate", "trajectories"))


def test_phases_add_up_and_start_again_once_taken() -> None:
    phases = Phases(CPU)
    for _ in range(2):
        with phases("update"):
            time.sleep(0.01)
    with pytest.raises(KeyError), phases("rollout"):
        raise KeyError
    seconds = phases.take()
    assert list(seconds) == ["seconds/update", "seconds/rollout"]
    assert seconds["seconds/update"] >= 0.02 and seconds["seconds/rollout"] >= 0
    assert phases.take() == {}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_lies_between_what_is_held_now_and_what_the_machine_has() -> None:
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert resident is not None
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert 0.95 * int(resident[1]) / 2**10 <= peak_memory_mib(CPU) <= machine
