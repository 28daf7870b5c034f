"""What `auto` stands for in a recipe's objective: found from the first steps of a run, by one rule for all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from tbrm.objectives import Objective
from tbrm.training.level import level_above

REWARDS_OVER_BETA = 100.0
"""What rewards that differ as much as any of a step are apart over the least beta, in nats: more than any task wants."""
_RATE = 0.1
"""By which share of itself beta rises in a step at most."""


class Auto:
    """The numbers of an objective that has `auto` in their place. `found` is what a checkpoint keeps of them.

    reward_offset: where the objective wants it, such that the mean of R/beta in the first step is a little above V(s_1), which
    is the reference's then. Where beta moves, the offset moves with it, so that this level stays.

    beta: a hundredth of how far the rewards of a step are apart, the first step in which they are; and as long as responses
    are further from the reference than objective.kl_target, it rises, up to a tenth a step, and then falls again. It is never
    lower than at first: a policy that is near its reference has not learnt yet, and wants no smaller penalty for it.
    """

    def __init__(self, objective: Objective, found: dict[str, float]) -> None:
        self._objective = objective
        self._found = found
        self.finds_beta = objective.beta == "auto"
        self.finds_offset = objective.reward_offset == "auto"

    @property
    def wants_values(self) -> bool:
        """Whether it has still to see the V(s_1) of a step."""
        return self.finds_offset and self._objective.wants_reward_above_value and "level" not in self._found

    def numbers(self, rewards: Sequence[float], values: Sequence[float]) -> Objective:
        """The objective with numbers for a step with these rewards, of which any but the first may be empty, and V(s_1)."""
        beta, offset = self._objective.beta, self._objective.reward_offset
        if self.finds_beta:
            beta = self._beta(rewards)
        if self.finds_offset:
            if self.wants_values and values:
                self._found |= {"level": level_above(fmean(values)), "reward": fmean(rewards)}
            offset = self._found.get("level", 0.0) * beta - self._found.get("reward", 0.0)
        return self._objective.model_copy(update={"beta": beta, "reward_offset": offset})

    def _beta(self, rewards: Sequence[float]) -> float:
        if "beta" not in self._found:
            apart = max(rewards, default=0.0) - min(rewards, default=0.0)
            if not apart > 0:  # nothing to learn yet, and nothing to tell by but their size
                return (max(map(abs, rewards), default=0.0) or 1.0) / REWARDS_OVER_BETA
            self._found |= {"beta": apart / REWARDS_OVER_BETA, "least_beta": apart / REWARDS_OVER_BETA}
        return self._found["beta"]

    def look(self, kl: float) -> None:
        """Moves beta by how far the step's responses are from the reference, in nats each."""
        if self.finds_beta and "beta" in self._found:
            error = min(1.0, max(-1.0, kl / self._objective.kl_target - 1))
            self._found["beta"] = max(self._found["least_beta"], self._found["beta"] * (1 + _RATE * error))

    def metrics(self, objective: Objective) -> dict[str, float]:
        """The numbers in the place of `auto`."""
        return {
            **({"beta": objective.beta} if self.finds_beta else {}),
            **({"reward_offset": objective.reward_offset} if self.finds_offset else {}),
        }
