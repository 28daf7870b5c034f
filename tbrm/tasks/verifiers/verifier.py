"""What a verifier is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from tbrm.tasks.task import Grade, Problem, Progress
from tbrm.tasks.user_code import explained


class Verifier(ABC, BaseModel):
    """Base of all verifiers. The fields are its options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @abstractmethod
    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        """One grade for each response; problems[i] is what responses[i] answers."""

    def grade(
        self,
        problems: Sequence[Problem],
        responses: Sequence[str],
        completion_ids: Sequence[list[int] | None],
        progress: Progress,
    ) -> list[Grade]:
        """The same, for verifiers that look at token ids (None: not known), or at how far training is, too."""
        if type(self).__module__.startswith("tbrm."):
            return self(problems, responses)
        name = f"verifier {type(self).__name__}"
        return explained(name, lambda part: self(problems[part], responses[part]), problems, responses)

    def require_objects(self) -> None:
        """As `Task.require_objects`."""

    def check_columns(self, names: Iterable[str]) -> None:
        """Raise ValueError if problems with these columns cannot be graded."""

    def check_problem(self, problem: Problem) -> None:
        """Raise ValueError if the problem cannot be graded; called for each row when a file is read."""
        for answer in problem.answers:
            self.check_answer(answer)

    def check_answer(self, answer: str) -> None:
        """Raise ValueError if `answer` can be no reference answer."""


class CompletionVerifier(Verifier):
    """Base of those that grade by `grade`, which token ids or the progress of training matter to."""

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return self.grade(problems, responses, [None] * len(responses), Progress())

    @abstractmethod
    def grade(
        self,
        problems: Sequence[Problem],
        responses: Sequence[str],
        completion_ids: Sequence[list[int] | None],
        progress: Progress,
    ) -> list[Grade]: ...
