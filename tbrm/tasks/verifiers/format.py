"""Right if the response has a given form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from pydantic import Field, field_validator

from tbrm.tasks.task import Grade, Problem
from tbrm.tasks.verifiers.verifier import Verifier
from tbrm.tasks.workers import Workers


class Format(Verifier):
    """1 if all of the response matches a regular expression, else 0; graded in processes that are killed when one takes too
    long, as a pattern with nested repetitions may for ever."""

    pattern: str = Field(
        r"<think>.*?</think>\s*<answer>.*?</answer>\s*",
        description="A regular expression of Python, which the whole response is to match; . matches line breaks too.",
    )
    timeout_seconds: float = Field(
        2.0, gt=0, description="A response that takes longer does not match, and is counted."
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        asked = [(self.pattern, response) for _, response in zip(problems, responses, strict=True)]
        outcomes = _workers().map("matches", asked, seconds=self.timeout_seconds)
        return [
            Grade(0.0, correct=False, failure=f"format: {outcome.failure}")
            if outcome.failure is not None
            else Grade(float(outcome.value), correct=outcome.value)
            for outcome in outcomes
        ]


@cache
def _workers() -> Workers:
    return Workers("tbrm.tasks.verifiers.format_process", 1, 2**30)
