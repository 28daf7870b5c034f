"""What a verifier is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from tbrm.tasks.base import Grade, Problem


class Verifier(ABC, BaseModel):
    """Base of all verifiers. The fields are its options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        """One grade for each response; problems[i] is what responses[i] answers."""

    def check_answer(self, answer: str) -> None:
        """Raise ValueError if `answer` can be no reference answer; called for each row when a file is read."""
