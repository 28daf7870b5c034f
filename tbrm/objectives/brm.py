"""Token-level Bellman residual minimisation: the ablation in the TBRM paper (arXiv 2505.15311)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tbrm.objectives.objective import Objective, TrajectoryLoss

if TYPE_CHECKING:
    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats


class Brm(Objective):
    """sum over h of (Q(s_h,a_h) - log pi_ref(a_h|s_h) - r_h/beta - V(s_{h+1}))^2, with V(s_{H+1}) = 0.

    The reward arrives with the last action. The residuals of a trajectory telescope to that of `tbrm`, which is what the
    metrics show.
    """

    @property
    def wants_reward_above_value(self) -> bool:
        return True

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        from tbrm_kernels import segment_sums

        # Row t + 1 stands for action t: so an empty trajectory, which ends where the one before it does, has a row too.
        rows = stats.lse.new_zeros(len(stats.lse) + 1)
        ends = batch.cu_seqlens[1:].long()
        is_last = rows.bool().index_fill(0, ends, True)[1:]
        reward = batch.rewards.masked_fill(batch.cu_seqlens.diff() == 0, 0.0).to(rows)
        step_reward = rows.index_add(0, ends, reward)[1:]
        # V(s_{h+1}) is the next row's lse, and nothing after a trajectory's last action.
        next_value = stats.lse.roll(-1).masked_fill(is_last, 0.0)
        q_value = stats.lse + stats.logprobs
        residual = q_value - batch.ref_logprobs - step_reward / self.beta - next_value
        return TrajectoryLoss(
            segment_sums(residual.square(), batch.cu_seqlens), segment_sums(residual, batch.cu_seqlens)
        )
