"""Right if the response, or the part of it that holds the answer, is the reference answer word for word."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from tbrm.tasks.answers import EXTRACTORS, Extractor
from tbrm.tasks.task import Grade, Problem
from tbrm.tasks.verifiers.text import TextVerifier


class Exact(TextVerifier):
    """Compares texts, white space around them aside."""

    answer: Extractor = Field("whole", description="Which part of the response is compared.")

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        extract = EXTRACTORS[self.answer]
        given = [extract(self.said(text)) for text in responses]
        right = [
            text in [answer.strip() for answer in each.answers] for each, text in zip(problems, given, strict=True)
        ]
        return [Grade(float(correct), correct) for correct in right]
