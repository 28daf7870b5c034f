"""That a layout is all that is wanted for another arrangement of trajectories: here each has a row of its own, padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import trained_weights
from tbrm.training.trainer import Trainer
from tbrm.trajectories.batch import TrajectoryBatch, moved
from tbrm.trajectories.layout import Layout
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import make_lm, tiny_config


@dataclass(frozen=True)
class Rows:
    ids: Tensor  # [N, L], padded at the end
    mask: Tensor  # [N, L]
    action_rows: Tensor  # [A], of the rows one after the other

    @property
    def input_ids(self) -> Tensor:
        return self.ids.flatten()

    def to(self, device: torch.device | str) -> Rows:
        return replace(self, **moved(self, device))

    def run(self, lm: Any, embedded: Tensor | None = None) -> Tensor:
        assert embedded is None
        lm.set_attn_implementation("sdpa")
        out = lm.base_model(input_ids=self.ids, attention_mask=self.mask, use_cache=False)
        hidden: Tensor = out.last_hidden_state.flatten(0, 1)[self.action_rows]
        return hidden


class Padded(Layout):
    def split(self, trajectories: Sequence[Trajectory], max_tokens: int, processes: int = 1) -> list[list[list[int]]]:
        return [[[i] for i in range(rank, len(trajectories), processes)] for rank in range(processes)]

    def pack(self, trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
        rows = [t.prompt_ids + t.response_ids for t in trajectories] or [[0]]
        longest = max(map(len, rows))
        bounds = tuple(accumulate((len(t.actions) for t in trajectories), initial=0))
        at = [row * longest + len(t.prompt_ids) - 1 + i for row, t in enumerate(trajectories) for i in t.actions]
        return TrajectoryBatch(
            Rows(
                torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
                torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
                torch.tensor(at, dtype=torch.int64),
            ),
            targets=torch.tensor([t.response_ids[i] for t in trajectories for i in t.actions], dtype=torch.int64),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            bounds=bounds,
        )


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
    padded = Padded().pack(items)
    assert torch.equal(padded.targets, packed.targets) and padded.bounds == packed.bounds
    torch.testing.assert_close(padded.inputs.run(policy.lm), expected, rtol=1e-4, atol=1e-4)


def test_a_training_step_is_the_same_with_another_layout(tmp_path: Path) -> None:
    def step(layout: Layout | None) -> tuple[dict[str, float], dict[str, Tensor]]:
        trainer = Trainer(tiny_config(tmp_path, evaluation={"prompts": 0}))
        if layout is not None:
            trainer.policy.layout = trainer.reference.model.layout = layout
        metrics = trainer.train_step()
        return metrics, {name: weight.detach() for name, weight in trained_weights(trainer.policy).items()}

    (packed, expected), (padded, weights) = step(None), step(Padded())
    for name in ("loss", "grad_norm", "value_mean", "entropy_mean", "reward_mean"):
        assert padded[name] == pytest.approx(packed[name], rel=1e-4), name
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=3e-4)  # AdamW's first step is the rate, 1e-3
