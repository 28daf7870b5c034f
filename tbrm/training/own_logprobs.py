"""What the policy itself says of trajectories, as it is: in place of what nobody said, or of what another engine did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tbrm.parallel import World
from tbrm.policy.model import PolicyModel
from tbrm.trajectories.trajectory import Trajectory


@torch.no_grad()
def own_logprobs(
    policy: PolicyModel, trajectories: Sequence[Trajectory], micro_batches: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """log pi of the actions of the trajectories in these micro-batches, by their index, on the CPU. All processes call it with
    equally many."""
    found: dict[int, Tensor] = {}
    for members in micro_batches:
        batch = policy.layout.pack([trajectories[i] for i in members]).to(policy.device)
        logprobs = policy(batch).logprobs.cpu()
        for index, start, end in zip(members, batch.bounds, batch.bounds[1:], strict=False):
            found[index] = logprobs[start:end].clone()
    return found


def score_rollout(policy: PolicyModel, trajectories: Sequence[Trajectory], max_tokens: int, world: World) -> int:
    """Keeps with each trajectory of a rollout that has just come in the policy's log-probs of this moment, which ratios are
    taken to from now on. Returns how many had none yet."""
    new = [t for t in trajectories if t.old_logprobs is None]
    if not new:
        return 0
    micro_batches = policy.layout.split(new, max_tokens, world.size)[world.rank]
    for part in world.gather(own_logprobs(policy, new, micro_batches)):
        for index, logprobs in part.items():
            new[index].old_logprobs = logprobs
    return len(new)
