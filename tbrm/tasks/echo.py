"""The smallest task that can be learnt from nothing but rewards: say the digit that the prompt ends with."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from pydantic import Field

from tbrm.tasks.task import Grade, Problem, Task


class Echo(Task):
    """A few random letters and a digit, such as ``kqz7``; right is a response whose only digit is that one.

    A random model is right now and then. Held-out prompts are never trained on, and answered by who has learnt the rule.
    """

    letters: int = Field(3, ge=2, le=16, description="Letters before the digit.")

    def problem(self, index: int, seed: int) -> Problem:
        return self._make(random.Random(f"train {seed} {index}"))

    def heldout(self, count: int) -> list[Problem]:
        if count > (most := 10 * 26**self.letters // 2):
            raise ValueError(
                f"letters: {self.letters} and a digit make {2 * most} prompts, and evaluation wants {count}: lower "
                "evaluation.prompts or raise letters"
            )
        numbers = random.Random("held out")
        distinct: dict[str, Problem] = {}
        while len(distinct) < count:
            problem = self._make(numbers)
            distinct.setdefault(problem.key, problem)
        return list(distinct.values())

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        right = [
            [character for character in response if character in string.digits] == [problem.answer]
            for problem, response in zip(problems, responses, strict=True)
        ]
        return [Grade(float(correct), correct) for correct in right]

    def _make(self, numbers: random.Random) -> Problem:
        letters, digit = numbers.choices(string.ascii_lowercase, k=self.letters), str(numbers.randrange(10))
        return Problem("".join([*letters, digit]), digit)
