"""TBA against the value of least variance: its mean is weighted by what each response does to the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tbrm.objectives.objective import Step
from tbrm.objectives.tba import Tba

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats


class Optimal(Tba):
    """residual = sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h) - R/beta - b, squared, with b detached.

    Its gradient is 2 residual times the score, sum_h grad log pi(a_h|s_h), and the b of which it has the least variance is the
    mean of sum_h (log pi - log pi_ref) - R/beta, weighted by the squared norms of the scores (the optimal baseline: Greensmith,
    Bartlett and Baxter, 2004; OPO, arXiv 2505.23585, for policy gradients). W = sum_h (1 - pi(a_h|s_h)) stands for that norm,
    as the score of a token is small where it was nearly sure; b is over all responses of the step, replayed ones too. On fresh
    responses any b leaves the expected gradient as it is.
    """

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        from tbrm_kernels import segment_sums

        weight = segment_sums(1 - stats.logprobs.exp(), batch.cu_seqlens)
        return {**super().measure(stats, batch), "weight": weight}

    def columns(self, step: Step) -> dict[str, Tensor]:
        values = step.rewards - self.beta * step.measured["log_ratio"]  # -beta times what is to be averaged
        weights = step.measured["weight"].clamp(min=0)
        if not weights.sum() > 0:  # all are sure of every token, or there are none
            weights = weights + 1
        return {"rewards": step.rewards - (weights * values).sum() / weights.sum()}
