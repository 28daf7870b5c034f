"""PPO's critic: what it learns from, beside which policy, what is kept of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tbrm.config.section import ConfigError
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config
from tests.tbrm.training.runs import assert_resumes_in_the_middle_of_a_rollout

SETTINGS: dict[str, Any] = {
    "objective": {"name": "ppo", "gae": 0.9, "discount": 0.99},
    "critic": {"learning_rate": 1e-2},
    "rollout__updates": 2,
    "rollout__max_new_tokens": 30,
    "rollout__truncated": "fixed",
    "rollout__truncated_reward": -1.0,
    "evaluation": {"prompts": 0},
}


def test_a_step_of_the_critic_is_the_mean_over_the_steps_tokens_whatever_the_micro_batches(tmp_path: Path) -> None:
    whole, parts = (
        Trainer(tiny_config(tmp_path / str(tokens), **SETTINGS, trainer__batch_tokens=tokens)) for tokens in (4096, 40)
    )
    values: list[torch.Tensor] = []
    for step in range(3):
        large, small = whole.train_step(), parts.train_step()
        for key in ("loss", "grad_norm", "critic/loss", "critic/grad_norm", "critic/explains"):
            assert small[key] == pytest.approx(large[key], rel=2e-3, abs=1e-5), (step, key)
        if step == 0:
            [later] = whole.supply.waiting  # it has had its values as the rollout came in, when they were all 0
            values = [t.old_values for t in later.trajectories if t.old_values is not None]
            assert len(values) == len(later.trajectories) and not any(v.any() for v in values)
    assert large["critic/loss"] < 0.9 * 0.5  # of rewards of -1 and 0, V = 0 has at most half of 1
    head = whole.critic.critic.head.weight if whole.critic else torch.zeros(1)
    assert head.abs().max() > 1e-3


def test_the_critic_begins_as_the_policy_and_leaves_it_alone(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(tmp_path, **{**SETTINGS, "optim__learning_rate": 1e-12}))
    assert trainer.critic is not None
    policy = {name: weight.detach().clone() for name, weight in trainer.policy.named_parameters()}
    backbone = trainer.critic.critic.backbone
    assert all(torch.equal(weight, policy[name]) for name, weight in backbone.named_parameters())
    for _ in range(2):  # in the first step the head is 0, and the backbone has no gradient
        trainer.train_step()
    assert all((weight - policy[name]).abs().max() < 1e-9 for name, weight in trainer.policy.named_parameters())
    assert any((weight - policy[name]).abs().max() > 1e-3 for name, weight in backbone.named_parameters())


def test_a_run_with_a_critic_resumes_in_the_middle_of_a_rollout_to_the_same_numbers(tmp_path: Path) -> None:
    assert_resumes_in_the_middle_of_a_rollout(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rollout__updates": 1, "data__trajectories": "some.jsonl"}, "data.trajectories"),
        ({"replay": {"capacity": 8, "samples_per_step": 2}}, "replay.samples_per_step"),
        ({"lora": {"rank": 4}, "model__name": "some/model"}, "lora.rank"),
        ({"parallel": {"vocab_parallel": True}}, "parallel.vocab_parallel"),
    ],
)
def test_what_a_critic_cannot_do_is_refused(tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{key} is set, but objective.name is 'ppo', whose critic learns from fresh"
    ):
        tiny_config(tmp_path, **{**SETTINGS, **settings})
