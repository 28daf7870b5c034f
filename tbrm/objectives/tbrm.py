"""Trajectory Bellman Residual Minimization (arXiv 2505.15311), and its kin: one squared residual per trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tbrm.objectives.objective import (
    Objective,
    Step,
    TrajectoryLoss,
    comparable,
    group_means,
    log_ratio,
    surprise,
    weighted_mean,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats


class Tbrm(Objective):
    """residual = value + sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h) - R/beta, and the loss is its square.

    At the optimum the value is log E_ref exp(R/beta), and what stands for it until then is a choice:

    `network`: V(s_1), the level of the logits. Nothing is detached: this is the true gradient. The mean of R/beta must not be
    below it, 35 to 50 for a small chat model, or wrong answers are pushed down before right ones are pushed up.

    `reference`: V(s_1) - V_ref(s_1), so that the residual starts at -R/beta, free of the arbitrary level of the logits (ReVal,
    arXiv 2603.23355, where it is used with a replay buffer and a reference that is reset now and then).

    `mean`: the mean of R/beta - (sum_h log pi - sum_h log pi_ref) over the group or, where every problem has one response, over
    the step (trajectory balance, arXiv 2503.18929: VarGrad's log Z); detached, which leaves VarGrad's gradient as it is.

    `optimal`: the same mean over the step, weighted. The gradient is 2 residual times the score, sum_h grad log pi(a_h|s_h),
    and of detached values that one has the least variance for which a response weighs as its score's squared norm (the optimal
    baseline: Greensmith, Bartlett and Baxter, 2004; OPO, arXiv 2505.23585, for policy gradients). sum_h (1 - pi(a_h|s_h))
    stands for that norm, as the score of a token is small where it was nearly sure. Replayed responses count too. On fresh
    responses any detached value leaves the expected gradient as it is.

    `learned`: v(s_1) / beta, where v is a linear function of the reference's last hidden state of the prompt, fitted to the
    trajectories before with such weights, those of what sampled them: sum_h (1 - mu(a_h|s_h)). No forward pass is wanted before
    the step's own, and a hopeless prompt has its own value, and so no gradient.
    """

    value: Literal["network", "reference", "mean", "optimal", "learned"] = Field(
        "network",
        description="What stands for the value of the prompt: network (V(s_1), the paper's), reference (V less the "
        "reference's: ReVal), mean (of the group: TBA), optimal (the step's mean of least variance), learned (of each prompt, "
        "beside the policy, with the same weights).",
    )
    centre_rewards: bool = Field(False, description="Subtract from each reward the mean over its problem's responses.")

    @property
    def wants_reward_above_value(self) -> bool:
        return self.value == "network"

    @property
    def wants_several_responses(self) -> str | None:
        return "centre_rewards" if self.centre_rewards else None

    @property
    def learns_value(self) -> bool:
        return self.value == "learned"

    @property
    def measures(self) -> bool:
        return self.value in ("mean", "optimal") or type(self).measure is not Tbrm.measure

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        found = {"log_ratio": log_ratio(stats, batch)}
        if self.value == "optimal":
            found["weight"] = surprise(stats, batch)
        return found

    def columns(self, step: Step) -> dict[str, Tensor]:
        """A value made of the step comes in through the rewards."""
        rewards = step.rewards
        if self.centre_rewards:
            rewards = rewards - group_means(rewards, step.groups)
        if self.value == "learned":
            assert step.learned is not None
            return {"rewards": rewards - step.learned}
        if self.value not in ("mean", "optimal"):
            return {"rewards": rewards}
        found = rewards - self.beta * step.measured["log_ratio"]
        if self.value == "mean":
            return {"rewards": rewards - group_means(found, comparable(step.groups))}
        return {"rewards": rewards - weighted_mean(found, step.measured["weight"])}

    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        from tbrm_kernels import segment_sums, trajectory_residual

        if self.value in ("network", "reference"):
            residual = trajectory_residual(
                stats.logprobs,
                stats.lse,
                batch.cu_seqlens,
                segment_sums(batch.ref_logprobs, batch.cu_seqlens),
                batch.rewards,
                self.beta,
                ref_values=batch.ref_values if self.value == "reference" else None,
            )
        else:
            residual = log_ratio(stats, batch) - batch.rewards / self.beta
        return TrajectoryLoss(residual.square(), residual)
