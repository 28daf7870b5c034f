"""ReVal ("Off-Policy Value-Based RL for LLMs"): TBRM whose value is calibrated by the reference's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tbrm.objectives.objective import Objective, Step, TrajectoryLoss, group_means

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats


class Reval(Objective):
    """residual = V(s_1) - V_ref(s_1) + sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h) - R/beta, squared.

    The residual starts at -R/beta, free of the arbitrary level of the model's logits. Used with a replay buffer
    (`replay.*`), a reference that is reset now and then, and, if wanted, rewards less their group's mean.
    """

    centre_rewards: bool = Field(False, description="Subtract from each reward the mean over its problem's responses.")

    @property
    def wants_several_responses(self) -> str | None:
        return "centre_rewards" if self.centre_rewards else None

    def columns(self, step: Step) -> dict[str, Tensor]:
        centre = group_means(step.rewards, step.groups) if self.centre_rewards else 0
        return {"rewards": step.rewards - centre}

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        from tbrm_kernels import segment_sums, trajectory_residual

        ref_sums = segment_sums(batch.ref_logprobs, batch.cu_seqlens)
        residual = trajectory_residual(
            stats.logprobs, stats.lse, batch.cu_seqlens, ref_sums, batch.rewards, self.beta, ref_values=batch.ref_values
        )
        return TrajectoryLoss(residual.square(), residual)
