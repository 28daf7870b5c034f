"""What verifiers that read a response's text have in common: where its answer is."""

from __future__ import annotations

from pydantic import Field

from tbrm.tasks.answers import Convention, Thinking, after_thinking
from tbrm.tasks.verifiers.verifier import Verifier


class TextVerifier(Verifier):
    """Base of those that read the response's text, of which reasoning is no part."""

    thinking: Thinking = Field(
        "required_closed",
        description="Reasoning between <think> and </think>. required_closed: it is no answer, and if it never ends there is "
        "none; ignored: the tags are text like any other.",
    )

    def said(self, response: str) -> str:
        """What of the response is its answer's."""
        return after_thinking(response, self.thinking)


class AnswerVerifier(TextVerifier):
    """Base of those that look for the answer by a convention."""

    answer: Convention = Field(
        "boxed_or_last",
        description=r"Where the answer is: boxed_or_last: in the last \boxed{}, which is none if it is unfinished, without any "
        "in the last line; last_boxed: in the last box alone; anywhere: wherever something like it is found.",
    )
