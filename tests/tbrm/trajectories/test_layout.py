"""Rows beside packing: the same hidden states, the same step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import trained_weights
from tbrm.training.trainer import Trainer
from tbrm.trajectories.layout import Rows
from tbrm.trajectories.packing import pack
from tbrm.trajectories.rows import pack_rows
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import make_lm, tiny_config


@torch.no_grad()
def test_hidden_states_are_those_of_packing_in_the_order_of_the_targets() -> None:
    prompt = list(range(5, 14))
    items = [
        Trajectory(prompt, list(range(20, 31)), 0.0),
        Trajectory(prompt, list(range(40, 47)), 0.0, action_mask=[True, False, False, True, True, False, True]),
        Trajectory([3, 9], list(range(50, 70)), 0.0),
    ]
    policy = PolicyModel(make_lm("qwen3", tied=True))
    packed = pack(items)
    expected = packed.inputs.run(policy.lm)
    policy.take_rows(lambda length: 0)
    padded = policy.layout.pack(items)
    assert torch.equal(padded.targets, packed.targets) and padded.bounds == packed.bounds
    torch.testing.assert_close(padded.inputs.run(policy.lm), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("processes", [1, 3])
def test_rows_are_dealt_within_the_budget_with_their_padding(processes: int) -> None:
    items = [Trajectory([5] * (1 + i % 4), [7] * (i * 5 % 11), 0.0) for i in range(20)]
    dealt = Rows(lambda length: 0).split(items, 40, processes)
    assert sorted(i for batches in dealt for members in batches for i in members) == list(range(20))
    assert len({len(batches) for batches in dealt}) == 1
    for members in (members for batches in dealt for members in batches):
        batch = pack_rows([items[i] for i in members])
        assert len(batch.inputs.input_ids) <= 40
        assert len(batch.targets) == sum(len(items[i].response_ids) for i in members)


def test_nothing_to_do_is_a_token_that_predicts_nothing() -> None:
    for items in ([], [Trajectory([3, 4], [], 0.0), Trajectory([3], [4], 0.0, action_mask=[False])]):
        batch = pack_rows(items)
        assert batch.inputs.input_ids.tolist() == [0]
        assert batch.bounds == (0,) * (len(items) + 1) and len(batch.targets) == 0


def test_a_training_step_is_the_same_in_rows(tmp_path: Path) -> None:
    def step(layout: str) -> tuple[dict[str, float], dict[str, Tensor]]:
        trainer = Trainer(
            tiny_config(tmp_path, model__layout=layout, data__trajectories=str(recorded), evaluation={"prompts": 0})
        )
        metrics = trainer.train_step()
        return metrics, {name: weight.detach() for name, weight in trained_weights(trainer.policy).items()}

    recorded = tmp_path / "recorded.jsonl"
    rows = [{"prompt_ids": [5, 6, i], "response_ids": list(range(7, 9 + i)), "reward": i % 2} for i in range(8)]
    recorded.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (packed, expected), (padded, weights) = step("packed"), step("rows")
    for name in ("loss", "grad_norm", "value_mean", "entropy_mean", "reward_mean"):
        assert padded[name] == pytest.approx(packed[name], rel=1e-4), name
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=3e-4)  # AdamW's first step is the rate, 1e-3
