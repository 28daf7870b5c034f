"""Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300), with what DAPO, Dr. GRPO, GSPO and CISPO make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tbrm.objectives.clipped import ClippedRatio, of_actions
from tbrm.objectives.objective import Step, comparable, group_means, group_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch


class Grpo(ClippedRatio):
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

    divide_by_std: bool = Field(True, description="Divide rewards less their group's mean by the group's deviation.")

    def columns(self, step: Step) -> dict[str, Tensor]:
        return {**super().columns(step), "advantage": group_advantages(step, divide_by_std=self.divide_by_std)}

    def advantages(self, batch: ScoredBatch) -> Tensor:
        return of_actions(batch.columns["advantage"], batch)


def group_advantages(step: Step, *, divide_by_std: bool) -> Tensor:
    """[N]: rewards less the mean of their group, over its deviation; 0 where a response is alone among groups."""
    groups = comparable(step.groups)
    rewards = step.rewards.double()  # of equal rewards the deviation is 0, and not what rounding leaves
    centred = rewards - group_means(rewards, groups)
    if divide_by_std:
        counts = group_sizes(groups)
        variance = group_means(centred.square(), groups) * counts / (counts - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + 1e-6)
    return centred.to(step.rewards.dtype)
