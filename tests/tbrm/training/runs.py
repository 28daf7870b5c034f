"""Runs of every kind of source, what a run wrote, and what makes two of them the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tbrm.reporting.metrics import is_timing, read_jsonl
from tbrm.training.trainer import Trainer
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import tiny_config

REPLAY = {
    "objective": {"name": "reval", "beta": 0.05, "centre_rewards": True, "reset_reference_every": 3},
    "replay": {"capacity": 12, "samples_per_step": 4, "sampling": "residual", "max_staleness": 5},
    # Three steps to a rollout: the checkpoint of step 4 stands in the middle of one.
    "rollout__prompts": 6,
    "rollout__updates": 3,
}
AHEAD = {**REPLAY, "rollout__max_staleness": 2}


def rows(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in read_jsonl(run_dir / "metrics.jsonl")]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = (run_dir / "checkpoints" / "latest").glob("*.safetensors")
    return {f"{path.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert read_jsonl(one / "eval.jsonl") == read_jsonl(other / "eval.jsonl")
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_resumes_in_the_middle_of_a_rollout(folder: Path, settings: dict[str, Any]) -> None:
    """Of several updates, without evaluations: stopped after step 3 and gone on with, it is the run of 4 steps."""
    settings = {**settings, "checkpoint": {"every": 3, "keep": 9}}
    Trainer(tiny_config(folder / "whole", **settings, trainer__steps=4)).train()
    Trainer(tiny_config(folder / "part", **settings, trainer__steps=3)).train()
    Trainer(tiny_config(folder / "part", **settings, trainer__steps=4), resume=True).train()
    for run in ("whole", "part"):
        (folder / run / "eval.jsonl").touch()
    assert_same_run(folder / "whole", folder / "part")


class Recorded:
    """A source that deals out the same trajectories at every step: a model of NaNs cannot generate."""

    def __init__(self, collected) -> None:
        self.collected = collected

    def collect(self, step: int, phases: object):
        return self.collected

    def rest_of_rollout(self) -> list[Trajectory]:
        return []
