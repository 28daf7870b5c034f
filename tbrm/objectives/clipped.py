"""What objectives with clipped ratios share: the surrogate of a token, its penalty, and how tokens are averaged."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tbrm.objectives.objective import Objective, Step, TrajectoryLoss

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats

_MAX_LOG_RATIO = 20.0  # beyond any clip; where exp overflows, 0 x inf would be in the gradient


class ClippedRatio(Objective):
    """loss of a token = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta (pi_ref/pi - log pi_ref/pi - 1), with A of
    whoever inherits. The last term is the KL estimator k3."""

    beta: float = Field(0.0, ge=0, description="Coefficient of the penalty for leaving the reference; 0: none.")
    ratio: Literal["token", "sequence", "cispo"] = Field(
        "token", description="Of policy to what sampled: of each token, of the response (GSPO), or detached (CISPO)."
    )
    clip_low: float = Field(0.2, gt=0, le=1, description="The ratio is clipped at 1 - clip_low; 1: at nothing below.")
    clip_high: float = Field(0.2, gt=0, description="The ratio is clipped at 1 + clip_high.")
    aggregate: Literal["sequence", "token", "constant"] = Field(
        "sequence", description="Mean of tokens: of each response first, of all alike (DAPO), or sum / constant_length."
    )
    constant_length: int = Field(
        1,
        ge=1,
        description="With aggregate: constant, what each response's sum is divided by; Dr. GRPO takes rollout.max_new_tokens.",
    )

    @property
    def wants_behaviour(self) -> bool:
        return True

    @property
    def takes_ratios(self) -> bool:
        return True

    @abstractmethod
    def advantages(self, batch: ScoredBatch) -> Tensor:
        """[A], detached: that of each action."""

    def columns(self, step: Step) -> dict[str, Tensor]:
        """What a token's loss weighs, so that the mean over responses is as `aggregate` says."""
        lengths = step.lengths.clamp(min=1).to(step.rewards)  # one that has no action has no loss
        weight = {
            "sequence": 1 / lengths,
            "token": (len(lengths) / step.lengths.sum().clamp(min=1).to(lengths)).expand(len(lengths)),
            "constant": lengths.new_full((len(lengths),), 1 / self.constant_length),
        }[self.aggregate]
        return {"weight": weight}

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        from tbrm_kernels import segment_sums

        advantage = self.advantages(batch)
        ratio, clipped = self._ratios(stats, batch)
        if self.ratio == "cispo":
            loss = -clipped.detach() * advantage * stats.logprobs
        else:
            loss = -(ratio * advantage).minimum(clipped * advantage)
        if batch.importance is not None:
            loss = loss * batch.importance
        if self.beta:
            to_reference = batch.ref_logprobs - stats.logprobs
            loss = loss + self.beta * (to_reference.exp() - to_reference - 1)
        summed = segment_sums(loss, batch.cu_seqlens)
        return TrajectoryLoss(batch.columns["weight"] * summed, -mean_of_actions(advantage, batch))

    def figures(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        from tbrm_kernels import segment_sums

        advantage = self.advantages(batch)
        ratio, clipped = self._ratios(stats, batch)
        is_clipped = ratio != clipped if self.ratio == "cispo" else ratio * advantage > clipped * advantage
        found = {"clip_fraction": is_clipped.to(ratio), "ratio_mean": ratio, "behaviour_kl": ratio - 1 - ratio.log()}
        return {name: segment_sums(values, batch.cu_seqlens) for name, values in found.items()}

    def _ratios(self, stats: TokenStats, batch: ScoredBatch) -> tuple[Tensor, Tensor]:
        """[A] each: the ratio, and the same clipped."""
        log_ratio = stats.logprobs - batch.old_logprobs
        if self.ratio == "sequence":
            log_ratio = of_actions(mean_of_actions(log_ratio, batch), batch)
        ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        return ratio, ratio.clamp(1 - self.clip_low, 1 + self.clip_high)


def of_actions(values: Tensor, batch: ScoredBatch) -> Tensor:
    """[A]: for each action the value [N] of its trajectory."""
    return values.repeat_interleave(batch.cu_seqlens.diff(), output_size=batch.bounds[-1])


def mean_of_actions(values: Tensor, batch: ScoredBatch) -> Tensor:
    """[N]: the mean of the values [A] of each trajectory's actions."""
    from tbrm_kernels import segment_sums

    return segment_sums(values, batch.cu_seqlens) / batch.cu_seqlens.diff().clamp(min=1)
