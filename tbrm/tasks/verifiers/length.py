"""A reward that is lost as a response grows too long."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from tbrm.tasks.task import Grade, Problem, Progress
from tbrm.tasks.verifiers.verifier import CompletionVerifier


class Length(CompletionVerifier):
    """0 up to `free_tokens`, from there in a straight line to -1 at `most_tokens`, and -1 beyond: the soft overlong punishment
    of DAPO (arXiv 2503.14476, equation 13). To be added to another verifier's reward."""

    free_tokens: int = Field(ge=0, description="A response of so many tokens loses nothing.")
    most_tokens: int = Field(ge=1, description="One of so many, and of more, gets -1.")

    @model_validator(mode="after")
    def _in_order(self) -> Length:
        if self.most_tokens <= self.free_tokens:
            raise ValueError(f"most_tokens is {self.most_tokens}; wants more than free_tokens, {self.free_tokens}")
        return self

    def grade(
        self,
        problems: Sequence[Problem],
        responses: Sequence[str],
        completion_ids: Sequence[list[int] | None],
        progress: Progress,
    ) -> list[Grade]:
        return [self._grade(ids) for _, ids in zip(problems, completion_ids, strict=True)]

    def _grade(self, ids: list[int] | None) -> Grade:
        if ids is None:
            return Grade(0.0, correct=False, failure="length: the response's tokens are not known")
        over = (len(ids) - self.free_tokens) / (self.most_tokens - self.free_tokens)
        return Grade(-min(max(over, 0.0), 1.0), correct=over <= 0)
