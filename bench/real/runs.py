"""Runs of `tbrm train`, one after the other, and what is kept of them: some kilobytes each, which are committed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.machine import commit, processor
from bench.real.plan import ROWS, Run, Size
from tbrm.reporting.metrics import read_jsonl

CHECKPOINT_EVERY = 12
KEPT = {"log_ratio_mean": "kl", "entropy_mean": "entropy", "grad_norm": "grad_norm", "reward_mean": "reward"}
"""Means over the steps since the evaluation before."""


class Stopped(Exception):
    """A run was told to stop, and has saved what it had."""


def result(out: Path, run: Run, size: Size) -> dict[str, Any] | None:
    """What is kept of the run, if it has been made with these overrides."""
    path = out / f"{run.name}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found if found["overrides"] == run.overrides(size) else None


def make(runs: Path, out: Path, run: Run, size: Size) -> dict[str, Any]:
    """Trains, or goes on with it, and keeps what came of it; the checkpoints go."""
    folder = runs / run.name
    if not (folder / "result.json").exists():
        _train(ROWS[run.row].recipe, folder, run.overrides(size))
    kept = {
        "overrides": run.overrides(size),
        "machine": processor(),
        "commit": commit(),
        **_compact(folder, ROWS[run.row].samples),
    }
    path = out / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return kept


def _train(recipe: Path, folder: Path, overrides: list[str]) -> None:
    saving = ["--resume", f"run.dir={folder}", f"checkpoint.every={CHECKPOINT_EVERY}"]
    command = [sys.executable, "-m", "tbrm", "train", str(recipe), *saving, *overrides]
    with subprocess.Popen(command) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        code = None
        while code is None:
            with suppress(KeyboardInterrupt):  # the run has had it, too, and saves before it leaves
                code = process.wait()
        signal.signal(signal.SIGTERM, before)
    if code in (130, 143, -signal.SIGINT, -signal.SIGTERM):  # below 0: before it listened
        raise Stopped(f"{folder} is stopped, and saved")
    if code:
        raise SystemExit(f"{' '.join(command)}\nended with code {code}; what came before it is kept")


def _compact(folder: Path, samples: int) -> dict[str, Any]:
    """Each evaluation, with the cost so far and the means of the steps since the one before."""
    rows, evals = read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "eval.jsonl")
    phases = {key for row in rows for key in row if key.startswith("seconds/")} - {"seconds/checkpoint"}
    points, first = [], evals[0]
    seconds, responses = 0.0, 0
    for before, now in pairwise([first, *evals]):
        steps = rows[before["step"] : now["step"]]
        seconds += sum(row.get(phase) or 0.0 for row in steps for phase in phases)
        responses += sum(_drawn(row, samples) for row in steps)
        means = {name: _mean([row.get(key) for row in steps]) for key, name in KEPT.items()}
        accuracy = {key: round(now[key], 4) for key in ("accuracy", "ci_low", "ci_high")}
        cost = {"step": now["step"], "responses": responses, "seconds": round(seconds, 1)}
        points.append({**cost, **accuracy, **means})
    return {
        "n_heldout": first["n"],
        "peak_memory_mib": max(row["peak_memory_mib"] for row in rows),
        "evaluations": points,
    }


def _drawn(row: dict[str, Any], samples: int) -> int:
    """Responses that a step has cost: those of problems that made room for others, too."""
    return int(
        row["trajectories"] + row.get("dropped", 0) + row.get("ungraded", 0) + samples * row.get("groups_alike", 0)
    )


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(f"{fmean(there):.4g}") if there else None
