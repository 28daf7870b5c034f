"""Right if the last number of the response equals the last number of the reference answer."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from tbrm.tasks.answers import last_number
from tbrm.tasks.task import Grade, Problem
from tbrm.tasks.verifiers.text import TextVerifier


class LastNumber(TextVerifier):
    """Compares decimal values: "1,000.0" is 1000 and "50%" is 50. The reference may be text that ends in its answer."""

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        given = [last_number(self.said(text)) for text in responses]
        right = [
            any(_equal(answer, number) for answer in each.answers) for each, number in zip(problems, given, strict=True)
        ]
        return [Grade(float(correct), correct) for correct in right]

    def check_answer(self, answer: str) -> None:
        if last_number(answer) is None:
            raise ValueError(f"verifier last_number: the answer {answer!r} holds no number")


def _equal(answer: str, given: str | None) -> bool:
    wanted = last_number(answer)
    return wanted is not None and given is not None and Decimal(wanted) == Decimal(given)
