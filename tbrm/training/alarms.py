"""What goes wrong while a run trains, seen in its metrics: each is said once, with what to do."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

from tbrm.objectives import Objective
from tbrm.reporting.metrics import WARNING
from tbrm.training.level import level_warning

Row = Mapping[str, Any]

STEPS = 5
"""Whose mean is looked at: one step says little."""

_AWAY = 0.2
_CUT_OFF = 1 / 3
_NATS_A_TOKEN = 0.5
_ENTROPY_LEFT = 0.1
_GAP = 0.05


class Alarms:
    """Looks at each step's metrics. `rows` are those of the steps that a resumed run has had."""

    def __init__(self, objective: Objective, rows: Iterable[Row] = ()) -> None:
        self.objective = objective
        self._first: list[Row] = []
        self._last: deque[Row] = deque(maxlen=STEPS)
        self._said: set[str] = set()
        for row in rows:
            self._add(row)
            self._said |= {key for key in row if key.startswith(WARNING)}

    def __call__(self, step: int, metrics: Row) -> dict[str, str]:
        """What to say after this step, by its key in the log."""
        self._add(metrics)
        found: dict[str, str | None] = {"level": level_warning(self.objective, metrics)} if step == 1 else {}
        if len(self._last) == STEPS:
            found |= {name: rule(self) for name, rule in _RULES.items()}
        new = {WARNING + name: f"step {step}: {text}" for name, text in found.items() if text}
        new = {key: text for key, text in new.items() if key not in self._said}
        self._said |= new.keys()
        return new

    def _add(self, row: Row) -> None:
        if not row.get("trajectories"):
            return
        self._last.append(row)
        if len(self._first) < STEPS:
            self._first.append(row)

    def now(self, key: str) -> float:
        """Its mean over the last steps; NaN, which is above and below nothing, where one lacks it."""
        return _mean(self._last, key)

    def at_first(self, key: str) -> float:
        return _mean(self._first, key)

    def rewards_over_beta(self, rows: Iterable[Row]) -> float:
        beta, offset = self.objective.beta, self.objective.reward_offset
        return fmean(
            (_number(row, "reward_mean") + row.get("reward_offset", offset)) / row.get("beta", beta) for row in rows
        )

    def value_drifts(self) -> str | None:
        if not self.objective.wants_reward_above_value:
            return None
        value, at_first = self.now("value_mean"), self.at_first("value_mean")
        target, target_at_first = self.rewards_over_beta(self._last), self.rewards_over_beta(self._first)
        # Between these all is well, and it may be above: at the optimum it is the mean of exp(R/beta), in logarithms.
        spread = self.now("reward_std") / self._last[-1].get("beta", self.objective.beta)
        low = min(at_first, target_at_first, target)
        high = max(at_first, target_at_first, target) + spread
        if not max(low - value, value - high) > _AWAY * abs(at_first):
            return None
        return (
            f"V(s_1) is {value:.3g}, was {at_first:.3g}, and drifts away from the mean of R/beta, {target:.3g}: answers are "
            "pushed up or down all at once. Lower optim.learning_rate, or set objective.value=learned, which asks nothing of "
            "V(s_1) (docs/objectives.md)"
        )

    def goes_far(self) -> str | None:
        kl, target = self.now("log_ratio_mean"), self.objective.kl_target
        if not kl > max(2 * target, _NATS_A_TOKEN * self.now("response_length_mean")):
            return None
        return (
            f"responses are {kl:.3g} nats from the reference (log_ratio_mean), and objective.kl_target is {target:g}: the "
            "model is being taken apart. Raise objective.beta, or have objective.beta=auto do it; or lower optim.learning_rate"
        )

    def entropy_collapses(self) -> str | None:
        entropy, at_first = self.now("entropy_mean"), self.at_first("entropy_mean")
        stands_still = self.now("reward_mean") <= self.at_first("reward_mean")
        if not (entropy < _ENTROPY_LEFT * at_first and stands_still):
            return None
        return (
            f"the entropy has fallen from {at_first:.2g} to {entropy:.2g} nats a token and the reward has not risen: the "
            "policy says one thing to all, and explores no more. Lower optim.learning_rate, or raise objective.beta"
        )

    def rewards_are_alike(self) -> str | None:
        if not all(_number(row, "reward_std") == 0 for row in self._last):
            return None
        return (
            f"in each of the last {STEPS} steps all rewards were alike ({self.now('reward_mean'):.3g} on average): there is "
            "nothing to learn from. An easier task, a prompt that says what form the answer has, more rollout.prompts, or a "
            "reward for parts of an answer (docs/tasks.md)"
        )

    def is_cut_off(self) -> str | None:
        if not (share := self.now("truncated_share")) > _CUT_OFF:
            return None
        return (
            f"{share:.0%} of the responses are cut off before their end: raise rollout.max_new_tokens, or, where the model "
            "talks on after its answer, set rollout.truncated=fixed"
        )

    def engine_differs(self) -> str | None:
        gap, at_first = self.now("behaviour_gap_mean"), self.at_first("behaviour_gap_mean")
        is_fresh = self.now("staleness_max") == 0
        if not (is_fresh and gap > max(_GAP, 3 * at_first)):
            return None
        return (
            f"log-probs of the engine and of the trainer are {gap:.2g} nats a token apart (behaviour_gap_mean) on responses of "
            f"the weights as they are, and were {at_first:.2g} at first: the engine samples from another model. See whether "
            "its weights arrive (sync/logprob_gap_max), or use rollout.engine=embedded (docs/rollouts.md)"
        )


_RULES: dict[str, Callable[[Alarms], str | None]] = {
    "value": Alarms.value_drifts,
    "kl": Alarms.goes_far,
    "entropy": Alarms.entropy_collapses,
    "rewards": Alarms.rewards_are_alike,
    "truncated": Alarms.is_cut_off,
    "engine": Alarms.engine_differs,
}


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return value if isinstance(value, int | float) else math.nan


def _mean(rows: Iterable[Row], key: str) -> float:
    return fmean(_number(row, key) for row in rows)
