"""What the policy itself says of trajectories, as it is: in place of what nobody said, or of what another engine did."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tbrm.parallel import World
from tbrm.policy.model import PolicyModel
from tbrm.training.each_action import of_each_action, of_rollout
from tbrm.trajectories.trajectory import Trajectory


def own_logprobs(
    policy: PolicyModel, trajectories: Sequence[Trajectory], micro_batches: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """log pi of the actions of the trajectories in these micro-batches: as `of_each_action`."""
    return of_each_action(lambda batch: policy(batch).logprobs, policy, trajectories, micro_batches)


def score_rollout(policy: PolicyModel, trajectories: Sequence[Trajectory], max_tokens: int, world: World) -> int:
    """Keeps with each trajectory of a rollout that has just come in the policy's log-probs of this moment, which ratios are
    taken to from now on. Returns how many had none yet."""
    new = [t for t in trajectories if t.old_logprobs is None]
    found = of_rollout(lambda batch: policy(batch).logprobs, policy, new, max_tokens, world)
    for trajectory, logprobs in zip(new, found, strict=True):
        trajectory.old_logprobs = logprobs
    return len(new)
