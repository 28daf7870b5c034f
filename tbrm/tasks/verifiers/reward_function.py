"""A user's own function, with the signature of TRL's reward functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tbrm.tasks.task import Grade, Problem, Progress
from tbrm.tasks.time_limit import TooLateError, within
from tbrm.tasks.user_code import explained
from tbrm.tasks.verifiers.verifier import CompletionVerifier

_OURS = ("prompts", "completions", "completion_ids", "trainer_state")
_NOT_COLUMNS = {"prompt", "completion", *_OURS}  # TRL keeps these back too


class RewardFunction(CompletionVerifier):
    """Grades with ``function(prompts=..., completions=..., completion_ids=..., trainer_state=..., **columns)``, which returns
    a reward for each completion, in a list, or an array or tensor [n] or [n, 1]. It may be async.

    A problem that is plain text gives a str prompt and a str completion; a conversation gives a list of messages and
    ``[{"role": "assistant", "content": response}]``. Each other column of the problems' rows is passed as a list, None
    where a row lacks it. Which reward counts as correct the task says. None means that the function does not apply to the
    problem: a failure, and so is a function that does not return in time.

    Grading raises UserCodeError if the function raises, and ValueError if it returns something else.
    """

    name: str
    function: Callable[..., Any]
    timeout_seconds: float = 600.0

    def grade(
        self,
        problems: Sequence[Problem],
        responses: Sequence[str],
        completion_ids: Sequence[list[int] | None],
        progress: Progress,
    ) -> list[Grade]:
        shown = [_as_trl(problem, response) for problem, response in zip(problems, responses, strict=True)]
        names = {name for problem in problems for name in problem.entry} - _NOT_COLUMNS
        columns = {name: [problem.entry.get(name) for problem in problems] for name in sorted(names)}
        columns |= {"prompts": [prompt for prompt, _ in shown], "completions": [completion for _, completion in shown]}
        columns["completion_ids"] = list(completion_ids)
        state = _trainer_state(progress)

        def call(part: slice) -> Any:
            given = {name: values[part] for name, values in columns.items()}
            return within(self.timeout_seconds, lambda: self.function(**given, trainer_state=state))

        try:
            rewards = explained(f"reward function {self.name}", call, problems, responses)
        except TooLateError:
            late = f"took longer than {self.timeout_seconds:g} seconds (task.reward_timeout_seconds)"
            return [self._failure(late)] * len(responses)
        return [self._grade(value) for value in self._listed(rewards, len(responses))]

    def check_columns(self, names: Iterable[str]) -> None:
        given = sorted(set(names) - _NOT_COLUMNS)
        try:
            inspect.signature(self.function).bind(**dict.fromkeys([*_OURS, *given]))
        except TypeError as error:
            raise ValueError(
                f"verifier: {self.name} cannot be called: {error}; it is called with {', '.join(_OURS)} and the columns "
                f"{', '.join(given)} as keywords, so it should take **kwargs, and no other without a default"
            ) from error

    def _listed(self, rewards: Any, count: int) -> Sequence[Any]:
        """One of each completion, of a list or of an array or tensor [count] or [count, 1]."""
        shape = tuple(getattr(rewards, "shape", ()))
        if len(shape) > 1 and shape != (count, 1):
            raise ValueError(
                f"reward function {self.name}: wanted {count} rewards, as an array of shape [{count}], got one of shape "
                f"{list(shape)}: sum or choose, so that each completion has one"
            )
        values = rewards.reshape(-1) if len(shape) > 1 and hasattr(rewards, "reshape") else rewards
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list | tuple) or len(values) != count:
            raise ValueError(f"reward function {self.name}: wanted a list of {count} rewards, got {rewards!r:.200}")
        return values

    def _grade(self, value: Any) -> Grade:
        if value is None:
            return self._failure("not applicable")
        try:
            reward = Grade(value, correct=False).reward
        except ValueError as error:
            raise ValueError(f"reward function {self.name}: {error}; None where there is none") from error
        return Grade(reward, correct=reward >= 1 - 1e-6)

    def _failure(self, why: str) -> Grade:
        return Grade(0.0, correct=False, failure=f"reward function {self.name}: {why}")


def _trainer_state(progress: Progress) -> Any:
    from transformers import TrainerState  # not for those who only look at a recipe

    return TrainerState(global_step=progress.step, max_steps=progress.steps)


def _as_trl(problem: Problem, response: str) -> tuple[Any, Any]:
    if isinstance(problem.prompt, str):
        return problem.prompt, response
    return [dict(message) for message in problem.prompt], [{"role": "assistant", "content": response}]
