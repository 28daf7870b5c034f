"""What stands for a reward function that is an object, until it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from tbrm.tasks.task import Grade, Problem
from tbrm.tasks.verifiers.verifier import Verifier


class GivenVerifier(Verifier):
    def require_objects(self) -> NoReturn:
        raise ValueError(
            "task.verifier: given, which stands for a function of Python's: give it, tbrm.train(config, reward=FUNCTION), or "
            "name a verifier"
        )

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        self.require_objects()
