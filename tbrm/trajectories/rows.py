"""How trajectories are laid out as rows: one each, padded at its end to the longest beside it.

For models whose layers cannot be told where in a packed row a trajectory begins: state that is carried along the row, attention
sinks, positions that attention adds by itself, rope that depends on the length of the call. No mask is wanted: a layer that
looks back alone never sees the padding behind a row. Prompts are read once for each response to them.

Letters: N trajectories, L tokens of a row, T = N L, A actions (response tokens that the policy chose).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from tbrm.trajectories.batch import TrajectoryBatch, backbone, moved
from tbrm.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LengthClass = Callable[[int], int]
"""Of a sequence of so many tokens: those of one class may stand side by side."""


@dataclass(frozen=True)
class RowInputs:
    ids: Tensor  # [N, L] int64
    action_rows: Tensor  # [A] int64: of all tokens, row after row, the one whose hidden state predicts the action

    @property
    def input_ids(self) -> Tensor:
        return self.ids.flatten()

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **moved(self, device))

    def run(self, lm: PreTrainedModel, embedded: Tensor | None = None) -> Tensor:
        tokens = {"input_ids": self.ids} if embedded is None else {"inputs_embeds": embedded.view(*self.ids.shape, -1)}
        hidden: Tensor = backbone(lm)(**tokens, use_cache=False).last_hidden_state
        return hidden.flatten(0, -2)[self.action_rows]


def pack_rows(trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
    """In the order given. One without actions has no row; if none acts, the batch is a token that predicts nothing."""
    rows = [t.prompt_ids + t.response_ids for t in trajectories if t.acts] or [[0]]
    longest = max(map(len, rows))
    starts = iter(range(0, len(rows) * longest, longest))
    at: list[int] = []
    for trajectory in trajectories:
        if trajectory.acts:
            first = next(starts) + len(trajectory.prompt_ids) - 1
            at += [first + i for i in trajectory.actions]
    bounds = tuple(accumulate((len(t.actions) for t in trajectories), initial=0))
    return TrajectoryBatch(
        RowInputs(
            torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], dtype=torch.int64),
            torch.tensor(at, dtype=torch.int64),
        ),
        targets=torch.tensor([t.response_ids[i] for t in trajectories for i in t.actions], dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        bounds=bounds,
    )


def deal_rows(
    trajectories: Sequence[Trajectory], max_tokens: int, processes: int, class_of: LengthClass
) -> list[list[list[int]]]:
    """The micro-batches of each process, of at most `max_tokens` tokens with their padding: lists of indices. One that alone
    has more is a micro-batch of its own. Rows of a length stand together; the batches go round the processes."""
    lengths = [len(t.prompt_ids) + len(t.response_ids) if t.acts else 0 for t in trajectories]
    batches: list[list[int]] = []
    first = 0  # length of the batch's longest row, its first
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        alike = batches and class_of(lengths[index]) == class_of(first)
        if not alike or (len(batches[-1]) + 1) * first > max_tokens:
            batches.append([])
            first = lengths[index]
        batches[-1].append(index)
    count = -(-len(batches) // processes)
    batches += [[] for _ in range(count * processes - len(batches))]
    return [batches[rank::processes] for rank in range(processes)]
