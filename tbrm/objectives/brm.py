"""Token-level Bellman residual minimisation: the ablation in the TBRM paper (arXiv 2505.15311)."""

from __future__ import annotations

import torch

from tbrm.data import ScoredBatch
from tbrm.objectives.base import Objective, TrajectoryLoss
from tbrm_kernels import TokenStats, segment_sums


class Brm(Objective):
    """sum over h of (Q(s_h,a_h) - log pi_ref(a_h|s_h) - r_h/beta - V(s_{h+1}))^2, with V(s_{H+1}) = 0.

    The reward arrives with the last action. The residuals of a trajectory telescope to that of `tbrm`, which is what the
    metrics show.
    """

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        starts, ends = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
        acted = ends > starts
        last = ends[acted] - 1
        # index_fill and index_put without in-place writes keep the graph simple: V(s_{h+1}) is the next row's lse,
        # and nothing after a trajectory's last action.
        is_last = torch.zeros_like(stats.lse, dtype=torch.bool).index_fill(0, last, True)
        next_value = torch.where(is_last, 0.0, stats.lse.roll(-1))
        step_reward = torch.zeros_like(stats.lse).index_put((last,), batch.rewards[acted].to(stats.lse))
        q_value = stats.lse + stats.logprobs
        residual = q_value - batch.ref_logprobs - step_reward / self.beta - next_value
        return TrajectoryLoss(
            segment_sums(residual.square(), batch.cu_seqlens), segment_sums(residual, batch.cu_seqlens)
        )
