"""Trajectory Bellman Residual Minimization (arXiv 2505.15311): one squared residual per trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tbrm.objectives.objective import Objective, TrajectoryLoss

if TYPE_CHECKING:
    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats


class Tbrm(Objective):
    """residual = V(s_1) + sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h) - R/beta, and the loss is its square.

    Nothing is detached: this is the true gradient. The mean of R/beta must not be below V(s_1), which is the level of the
    logits, 35 to 50 for a small chat model, or wrong answers are pushed down before right ones are pushed up.
    """

    wants_reward_above_value: ClassVar[bool] = True

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        from tbrm_kernels import segment_sums, trajectory_residual

        ref_sums = segment_sums(batch.ref_logprobs, batch.cu_seqlens)
        residual = trajectory_residual(stats.logprobs, stats.lse, batch.cu_seqlens, ref_sums, batch.rewards, self.beta)
        return TrajectoryLoss(residual.square(), residual)
