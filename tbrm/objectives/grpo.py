"""Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300), with what DAPO, Dr. GRPO, GSPO and CISPO make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tbrm.objectives.objective import Objective, Step, TrajectoryLoss, comparable, group_means

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats

_MAX_LOG_RATIO = 20.0  # beyond any clip; where exp overflows, 0 x inf would be in the gradient


class Grpo(Objective):
    """loss of a token = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta (pi_ref/pi - log pi_ref/pi - 1).

    A = (R - mean R) / (std R + 1e-6) over the group (std with n - 1) or, where every problem has one response, over the step;
    without the division it is Dr. GRPO's (arXiv 2503.20783). The last term is the KL estimator k3, per token as published.

    The ratio r, mu what sampled the token (with `rollout.importance: truncated` the policy as the rollout came in, and the
    first term weighs min(that / mu, cap): truncated importance sampling, Yao et al., 2025):
    `token`: pi(a_h|s_h) / mu(a_h|s_h), where clip_high above clip_low is DAPO's clip-higher (arXiv 2503.14476).
    `sequence`: the geometric mean of these over the response, for all of its tokens (GSPO, arXiv 2507.18071).
    `cispo`: as `token`, but the first term is -clip(r) A log pi(a_h|s_h), the clipped ratio detached: every token keeps a
    gradient (MiniMax-M1, arXiv 2506.13585).

    The tokens' losses are averaged by `aggregate`:
    `sequence`: over each response, then over responses (GRPO, GSPO).
    `token`: over all tokens of the step (DAPO, CISPO).
    `constant`: summed over each response and divided by one length, then averaged over responses (Dr. GRPO).
    """

    beta: float = Field(0.0, ge=0, description="Coefficient of the penalty for leaving the reference; 0: none.")
    ratio: Literal["token", "sequence", "cispo"] = Field(
        "token", description="Of policy to what sampled: of each token, of the response (GSPO), or detached (CISPO)."
    )
    clip_low: float = Field(0.2, gt=0, le=1, description="The ratio is clipped at 1 - clip_low; 1: at nothing below.")
    clip_high: float = Field(0.2, gt=0, description="The ratio is clipped at 1 + clip_high.")
    divide_by_std: bool = Field(True, description="Divide rewards less their group's mean by the group's deviation.")
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

    def columns(self, step: Step) -> dict[str, Tensor]:
        lengths = step.lengths.to(step.rewards)
        weight = {
            "sequence": 1 / lengths,
            "token": (len(lengths) / lengths.sum()).expand(len(lengths)),
            "constant": lengths.new_full((len(lengths),), 1 / self.constant_length),
        }[self.aggregate]
        return {"advantage": group_advantages(step, divide_by_std=self.divide_by_std), "weight": weight}

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        from tbrm_kernels import segment_sums

        advantage = of_actions(batch.columns["advantage"], batch)
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
        return TrajectoryLoss(batch.columns["weight"] * summed, -batch.columns["advantage"])

    def figures(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        from tbrm_kernels import segment_sums

        advantage = of_actions(batch.columns["advantage"], batch)
        ratio, clipped = self._ratios(stats, batch)
        is_clipped = ratio != clipped if self.ratio == "cispo" else ratio * advantage > clipped * advantage
        found = {"clip_fraction": is_clipped.to(ratio), "ratio_mean": ratio, "behaviour_kl": ratio - 1 - ratio.log()}
        return {name: segment_sums(values, batch.cu_seqlens) for name, values in found.items()}

    def _ratios(self, stats: TokenStats, batch: ScoredBatch) -> tuple[Tensor, Tensor]:
        """[A] each: the ratio, and the same clipped."""
        from tbrm_kernels import segment_sums

        log_ratio = stats.logprobs - batch.old_logprobs
        if self.ratio == "sequence":
            mean = segment_sums(log_ratio, batch.cu_seqlens) / batch.cu_seqlens.diff().clamp(min=1)
            log_ratio = of_actions(mean, batch)
        ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        return ratio, ratio.clamp(1 - self.clip_low, 1 + self.clip_high)


def group_advantages(step: Step, *, divide_by_std: bool) -> Tensor:
    """[N]: rewards less the mean of their group, over its deviation; 0 where a response is alone among groups."""
    groups = comparable(step.groups)
    rewards = step.rewards.double()  # of equal rewards the deviation is 0, and not what rounding leaves
    centred = rewards - group_means(rewards, groups)
    if divide_by_std:
        _, member = groups.unique(return_inverse=True)
        counts = member.bincount()[member]
        variance = group_means(centred.square(), groups) * counts / (counts - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + 1e-6)
    return centred.to(step.rewards.dtype)


def of_actions(values: Tensor, batch: ScoredBatch) -> Tensor:
    """[A]: for each action the value [N] of its trajectory."""
    return values.repeat_interleave(batch.cu_seqlens.diff(), output_size=batch.bounds[-1])
