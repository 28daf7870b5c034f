"""The comparison on a real model: which runs it wants, what it keeps of them, and that it goes on where it was."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import bench.real.runs as runs
from bench.real.__main__ import Comparison, _arguments
from bench.real.plan import ROWS, TASKS, TUNING_SEED, Run, Size
from bench.real.runs import Stopped, make, result
from bench.real.tables import table
from tbrm.config.recipe import load_config

SIZE = Size(steps=4, responses=32, evaluations=2)


def write_run(folder: Path, accuracy: float, *, alike: int = 0) -> None:
    """What `tbrm train` leaves of four steps of eight problems with four responses each."""
    folder.mkdir(parents=True, exist_ok=True)
    step = {"trajectories": 32, "dropped": 0, "groups_alike": alike, "log_ratio_mean": 0.5, "entropy_mean": None}
    step |= {"seconds/rollout": 2.0, "seconds/update": 3.0, "seconds/checkpoint": 100.0, "peak_memory_mib": 700.0}
    lines = [{"step": n, **step, "grad_norm": float(n), "reward_mean": 0.0} for n in range(1, 5)]
    evals = [{"step": n, "n": 200, "accuracy": accuracy * n / 4, "ci_low": 0.0, "ci_high": 1.0} for n in (0, 2, 4)]
    for name, rows in (("metrics", lines), ("eval", evals)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "result.json").write_text("{}")


@pytest.mark.parametrize(("task", "row"), [*((task, "optimal") for task in TASKS), *(("sums", row) for row in ROWS)])
def test_every_run_is_a_recipe_of_as_many_responses(task: str, row: str) -> None:
    overrides = Run(task, row, 1e-5, 0).overrides(Size())
    config = load_config(str(ROWS[row].recipe), overrides)
    assert config.rollout.prompts * config.rollout.samples == Size().responses
    assert (config.model.name == "tiny") is (task == "tiny")


def test_what_is_kept_has_the_cost_up_to_each_evaluation(tmp_path: Path) -> None:
    run = Run("tiny", "dapo", 1e-3, 0)
    folder = tmp_path / "runs" / run.name
    write_run(folder, 0.5, alike=3)
    kept = make(tmp_path / "runs", tmp_path / "out", run, SIZE)
    assert kept == result(tmp_path / "out", run, SIZE) and not (folder / "checkpoints").exists()
    points = kept["evaluations"]
    assert [point["accuracy"] for point in points] == [0.0, 0.25, 0.5]
    assert [point["seconds"] for point in points] == [0.0, 10.0, 20.0]
    assert [point["responses"] for point in points] == [0, 88, 176], (
        "problems that made room for others were answered, too"
    )
    assert [point["grad_norm"] for point in points] == [None, 1.5, 3.5]
    assert result(tmp_path / "out", run, Size()) is None, "made with other overrides"


def test_the_best_rate_of_another_seed_trains_the_reported_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Run] = []

    def trained(recipe: Path, folder: Path, overrides: list[str]) -> None:
        rate, seed = float(folder.name.split("-seed-")[0].removeprefix("rate-")), int(folder.name.split("-seed-")[1])
        made.append(Run("tiny", folder.parent.name, rate, seed))
        if len(made) == 3:
            raise Stopped("stopped")
        write_run(folder, {5e-4: 0.6, 1e-3: 0.6}.get(rate, 0.4))

    monkeypatch.setattr(runs, "_train", trained)
    page = tmp_path / "page.md"
    page.write_text("<!-- real -->\n<!-- /real -->\n")
    arguments = [
        "real",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
        "--page",
        str(page),
        "--tasks",
        "tiny",
    ]
    arguments += ["--rows", "optimal", "--seeds", "0", "1", "--steps", "4", "--evaluations", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    comparison = Comparison(_arguments())
    assert comparison.count() == 7
    with pytest.raises(Stopped):
        comparison.make()
    comparison.make()
    rates = TASKS["tiny"].rates
    tuning = [Run("tiny", "optimal", rate, TUNING_SEED) for rate in rates]
    reported = [Run("tiny", "optimal", 5e-4, seed) for seed in (0, 1)]
    assert made == [*tuning[:3], *tuning[2:], *reported], "of equal ones the lower rate; what was stopped, again"
    comparison.make()
    assert len(made) == 8 and comparison.count() == 0
    comparison.publish()
    assert "| `optimal` | 60.0%, 60.0% | **60.0%** |" in page.read_text()
    assert "run 5 of 5" in capsys.readouterr().out


def test_within_noise_of_the_best_is_bold() -> None:
    def run(accuracy: float) -> dict[str, Any]:
        end = {"accuracy": accuracy, "seconds": 1.0, "kl": 1.0, "entropy": None}
        return {"n_heldout": 200, "peak_memory_mib": 1.0, "evaluations": [end]}

    rows = {name: [run(accuracy)] * 3 for name, accuracy in (("a", 0.8), ("b", 0.75), ("c", 0.5))}
    found = table("sums", rows, {("sums", name): 1e-5 for name in rows})
    assert "**80.0%**" in found and "**75.0%**" in found and "| 50.0% |" in found


def test_a_run_that_is_told_to_stop_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The signal goes to both; the run saves what it has, and leaves with 143."""
    code = (
        "import signal, sys, time, pathlib\n"
        "def leave(*_):\n"
        "    time.sleep(0.2); pathlib.Path(sys.argv[-1]).write_text('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "import os; os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(20); sys.exit(1)\n"
    )
    script, saved = tmp_path / "tbrm.py", tmp_path / "saved"
    script.write_text(code)
    monkeypatch.setattr(runs.subprocess, "Popen", _popen_of(script, saved, runs.subprocess.Popen))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        runs._train(Path("recipe.yaml"), tmp_path, [])
    assert saved.read_text() == "saved" and signal.getsignal(signal.SIGTERM) == before


def _popen_of(script: Path, saved: Path, popen: Any) -> Any:
    return lambda command: popen([sys.executable, str(script), str(saved)])
