"""Trajectory balance ("Trajectory Balance with Asynchrony"): TBRM whose value of the prompt is estimated from its group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tbrm.objectives.objective import Objective, Step, TrajectoryLoss, comparable, group_means

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats


class Tba(Objective):
    """residual = log Z + sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h) - R/beta, squared.

    log Z is the mean of R/beta - (sum_h log pi - sum_h log pi_ref) over the group (VarGrad), or, where every problem has one
    response, over the step; detached, which leaves the gradient as it is. It comes in through the rewards.
    """

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        return {"log_ratio": self._log_ratio(stats, batch)}

    def columns(self, step: Step) -> dict[str, Tensor]:
        log_z = group_means(step.rewards - self.beta * step.measured["log_ratio"], comparable(step.groups))
        return {"rewards": step.rewards - log_z}

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        residual = self._log_ratio(stats, batch) - batch.rewards / self.beta
        return TrajectoryLoss(residual.square(), residual)

    def _log_ratio(self, stats: TokenStats, batch: ScoredBatch) -> Tensor:
        from tbrm_kernels import segment_sums

        return segment_sums(stats.logprobs - batch.ref_logprobs, batch.cu_seqlens)
