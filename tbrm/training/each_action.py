"""What a model says of each action of trajectories: of some micro-batches, or of a rollout by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tbrm.parallel import World
from tbrm.policy.model import PolicyModel
from tbrm.trajectories.batch import TrajectoryBatch
from tbrm.trajectories.trajectory import Trajectory

Says = Callable[[TrajectoryBatch], Tensor]
"""[A] of a batch's actions."""


@torch.no_grad()
def of_each_action(
    says: Says, model: PolicyModel, trajectories: Sequence[Trajectory], micro_batches: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """Of the trajectories in these micro-batches, laid out as `model` reads them, by their index, on the CPU. All processes
    call it with equally many."""
    found: dict[int, Tensor] = {}
    for members in micro_batches:
        batch = model.layout.pack([trajectories[i] for i in members]).to(model.device)
        values = says(batch).cpu()
        for index, start, end in zip(members, batch.bounds, batch.bounds[1:], strict=False):
            found[index] = values[start:end].clone()
    return found


def of_rollout(
    says: Says, model: PolicyModel, trajectories: Sequence[Trajectory], max_tokens: int, world: World
) -> list[Tensor]:
    """Of all of them, which every process has, and each looks at some of."""
    if not trajectories:
        return []
    micro_batches = model.layout.split(trajectories, max_tokens, world.size)[world.rank]
    parts = world.gather(of_each_action(says, model, trajectories, micro_batches))
    found = {index: values for part in parts for index, values in part.items()}
    return [found[index] for index in range(len(trajectories))]
