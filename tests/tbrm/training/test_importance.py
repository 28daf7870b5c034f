"""Ratios between engine and trainer: of a rollout that serves several updates, and of an engine that computes otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tbrm.config.section import ConfigError
from tbrm.objectives.grpo import Grpo
from tbrm.training.own_logprobs import own_logprobs
from tbrm.training.trainer import Trainer
from tbrm.trajectories.batch import ScoredBatch
from tests.tbrm.conftest import tiny_config
from tests.tbrm.training.runs import assert_resumes_in_the_middle_of_a_rollout

SKEW = (0.3, -0.6)
SETTINGS: dict[str, Any] = {
    "objective": {"name": "grpo", "divide_by_std": False},
    "rollout__updates": 2,
    "rollout__importance": "truncated",
    "rollout__importance_cap": 1.5,
}


def skewed(trainer: Trainer) -> Trainer:
    """Its engine says of every other token that it was likelier than it was, and of the others that it was less so."""
    real = trainer.engine.generate

    def generate(*arguments: Any) -> list[list[Any]]:
        def skew(response: Any) -> Any:
            return replace(response, logprobs=[x + SKEW[i % 2] for i, x in enumerate(response.logprobs)])

        return [[skew(response) for response in responses] for responses in real(*arguments)]

    trainer.engine.generate = generate  # type: ignore[method-assign]
    return trainer


def test_ratios_are_to_the_policy_as_the_rollout_came_in_and_the_engines_gap_is_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[ScoredBatch] = []
    real = Grpo.figures
    monkeypatch.setattr(Grpo, "figures", lambda *given: batches.append(given[2]) or real(*given))
    trainer = skewed(Trainer(tiny_config(tmp_path, **SETTINGS)))
    first = trainer.train_step()
    [later] = trainer.supply.waiting
    assert first["old_scored"] == 8  # of both updates
    assert first["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    for batch in batches:
        assert batch.importance is not None
        gaps = batch.old_logprobs - batch.behaviour_logprobs
        assert torch.allclose(batch.importance, gaps.exp().clamp(max=1.5))
        assert {round(gap, 3) for gap in gaps.tolist()} <= {-0.3, 0.6}  # minus the skew
        assert batch.importance.max() == 1.5 < batch.importance.new_tensor(0.6).exp()

    with torch.no_grad():  # whatever the first update was
        for weight in trainer.policy.parameters():
            weight.mul_(1.05)
    second = trainer.train_step()
    assert second["old_scored"] == 0
    assert second["behaviour_kl"] > 1e-7  # the policy has moved by a step
    now = own_logprobs(trainer.policy, later.trajectories, [list(range(len(later.trajectories)))])
    assert any((now[i] - t.old_logprobs).abs().max() > 1e-4 for i, t in enumerate(later.trajectories))


def test_without_it_the_engines_gap_is_in_the_ratio(tmp_path: Path) -> None:
    metrics = skewed(Trainer(tiny_config(tmp_path, **{**SETTINGS, "rollout__importance": "none"}))).train_step()
    low, high = (torch.tensor(-x).exp().item() for x in SKEW)
    assert low + 0.3 < metrics["ratio_mean"] < high
    assert metrics["behaviour_gap_mean"] == pytest.approx(0.45, abs=0.15)
    assert "old_scored" not in metrics


def test_a_run_with_ratios_resumes_in_the_middle_of_a_rollout_to_the_same_numbers(tmp_path: Path) -> None:
    replay = {"replay": {"capacity": 8, "samples_per_step": 2}, "evaluation": {"prompts": 0}}
    assert_resumes_in_the_middle_of_a_rollout(tmp_path, {**SETTINGS, **replay})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": {"name": "tba", "beta": 0.1}},
            r"importance is truncated but objective.name is 'tba', which has no",
        ),
        ({"data__trajectories": "some.jsonl", "rollout__updates": 1}, r"truncated, together with data.trajectories"),
    ],
)
def test_weights_that_nothing_would_read_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **{**SETTINGS, **settings})
