"""A user's own function, with the signature of TRL's reward functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tbrm.tasks.base import Grade, Problem
from tbrm.tasks.verifiers.base import Verifier

_NOT_COLUMNS = {"prompt", "prompts", "completion", "completions", "completion_ids"}  # TRL keeps these back too


class RewardFunction(Verifier):
    """Grades with ``function(prompts=..., completions=..., **columns) -> list[float | None]``.

    A problem that is plain text gives a str prompt and a str completion; a conversation gives a list of messages and
    ``[{"role": "assistant", "content": response}]``. Each other column of the problems' rows is passed as a list, None
    where a row lacks it. A reward of 1 or more counts as correct. None means that the function does not apply to the
    problem: reward 0, counted as a failure.

    Calling it raises RuntimeError if the function raises, and ValueError if it returns something else.
    """

    name: str
    function: Callable[..., Any]

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        shown = [_as_trl(problem, response) for problem, response in zip(problems, responses, strict=True)]
        names = {name for problem in problems for name in problem.entry} - _NOT_COLUMNS
        columns = {name: [problem.entry.get(name) for problem in problems] for name in sorted(names)}
        try:
            rewards = self.function(prompts=[p for p, _ in shown], completions=[c for _, c in shown], **columns)
        except Exception as error:
            raise RuntimeError(
                f"reward function {self.name} raised {error!r}; it is called with prompts, completions and the columns "
                f"{', '.join(columns)} as keywords, so it should take **kwargs"
            ) from error
        if not isinstance(rewards, list | tuple) or len(rewards) != len(responses):
            raise ValueError(
                f"reward function {self.name}: wanted a list of {len(responses)} rewards, got {rewards!r:.200}"
            )
        return [self._grade(reward) for reward in rewards]

    def _grade(self, reward: Any) -> Grade:
        if reward is None:
            return Grade(0.0, correct=False, failure=f"reward function {self.name}: not applicable")
        try:
            value = float(reward)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"reward function {self.name}: a reward must be a finite number or None, got {reward!r}")
        return Grade(value, correct=value >= 1 - 1e-6)


def _as_trl(problem: Problem, response: str) -> tuple[Any, Any]:
    if isinstance(problem.prompt, str):
        return problem.prompt, response
    return [dict(message) for message in problem.prompt], [{"role": "assistant", "content": response}]
