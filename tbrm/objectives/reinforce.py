"""The plain policy gradient (Williams, 1992): no ratio, no clipping; what old data does to it is not corrected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tbrm.objectives.objective import Objective, Step, TrajectoryLoss, comparable, group_means

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats


class Reinforce(Objective):
    """loss = -(A - beta (sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h))) sum_h log pi(a_h|s_h), the bracket detached.

    A is the reward less the mean of its group, or, where every problem has one response, of the step. On fresh
    trajectories this is the gradient of -(E[R] - beta KL(pi || pi_ref)).
    """

    def columns(self, step: Step) -> dict[str, Tensor]:
        return {"rewards": step.rewards - group_means(step.rewards, comparable(step.groups))}

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        from tbrm_kernels import segment_sums

        logprob_sums = segment_sums(stats.logprobs, batch.cu_seqlens)
        log_ratio = logprob_sums - segment_sums(batch.ref_logprobs, batch.cu_seqlens)
        residual = (log_ratio - batch.rewards / self.beta).detach()
        return TrajectoryLoss(self.beta * residual * logprob_sums, residual)
