"""Proximal policy optimisation (Schulman et al., 2017, arXiv 1707.06347), with a critic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tbrm.objectives.clipped import ClippedRatio

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch


class Ppo(ClippedRatio):
    """loss of a token = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta (pi_ref/pi - log pi_ref/pi - 1).

    A_h = sum over l >= 0 of (discount gae)^l delta_{h+l}, delta_h = r_h + discount V(s_{h+1}) - V(s_h): generalised advantage
    estimation (Schulman et al., 2016, arXiv 1506.02438), with r_H = R, all other r_h = 0 and V(s_{H+1}) = 0, less the mean and
    over the deviation of all tokens of the step. V is the critic's as the rollout came in.

    The critic learns from max((V - G)^2, (clip(V, V_old - value_clip, V_old + value_clip) - G)^2) / 2, the mean over all tokens
    of the step, with G_h = A_h + V_old(s_h), A before it is scaled.
    """

    aggregate: Literal["sequence", "token", "constant"] = Field(
        "token", description="Mean of tokens: of all alike, of each response first, or sum / constant_length."
    )
    discount: float = Field(1.0, gt=0, le=1, description="What the value of the next token counts.")
    gae: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Lambda of generalised advantage estimation; 1: the return less the critic's value.",
    )
    value_clip: float = Field(0.2, gt=0, description="How far the critic's value may go from that of the rollout.")

    @property
    def has_critic(self) -> bool:
        return True

    def advantages(self, batch: ScoredBatch) -> Tensor:
        return batch.of_actions["advantage"]

    def estimate(self, values: Tensor, reward: float) -> tuple[Tensor, Tensor]:
        """Of one trajectory's values [H]: the advantages [H], not scaled yet, and the returns [H] that the critic learns."""
        advantages = values.new_empty(len(values))
        later, next_value = 0.0, 0.0
        for h in reversed(range(len(values))):
            delta = (reward if h == len(values) - 1 else 0.0) + self.discount * next_value - values[h].item()
            later = delta + self.discount * self.gae * later
            advantages[h], next_value = later, values[h].item()
        return advantages, advantages + values

    def value_loss(self, values: Tensor, batch: ScoredBatch) -> Tensor:
        """[A]: of the critic's values [A]."""
        old, returns = batch.of_actions["old_value"], batch.of_actions["return"]
        clipped = values.clamp(old - self.value_clip, old + self.value_clip)
        return (values - returns).square().maximum((clipped - returns).square()) / 2
