"""Trajectory balance ("Trajectory Balance with Asynchrony"): TBRM whose value of the prompt is estimated from its group."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from tbrm.data import ScoredBatch
from tbrm.objectives.base import Objective, TrajectoryLoss, comparable, group_means
from tbrm_kernels import TokenStats, segment_sums


class Tba(Objective):
    """residual = log Z + sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h) - R/beta, squared.

    log Z is the mean of R/beta - (sum_h log pi - sum_h log pi_ref) over the group (VarGrad), or, where every problem has one
    response, over the step; detached, which leaves the gradient as it is. It comes in through the rewards.
    """

    uses_log_ratios: ClassVar[bool] = True

    def compare(self, rewards: Tensor, groups: Tensor, log_ratios: Tensor) -> Tensor:
        return rewards - group_means(rewards - self.beta * log_ratios, comparable(groups))

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        log_ratio = segment_sums(stats.logprobs - batch.ref_logprobs, batch.cu_seqlens)
        residual = log_ratio - batch.rewards / self.beta
        return TrajectoryLoss(residual.square(), residual)
