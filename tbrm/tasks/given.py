"""What stands for a task that is an object, where a run's config.yaml is read again without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from pydantic import ConfigDict

from tbrm.tasks.task import Grade, Problem, Task


class GivenTask(Task):
    """It has the keys of the object, and can do nothing."""

    model_config = ConfigDict(extra="allow")

    def require_objects(self) -> NoReturn:
        raise ValueError(
            "task.name: given, which stands for an object of Python's: give it, tbrm.train(config, task=MyTask(...)), or "
            "name a task"
        )

    def problem(self, index: int, seed: int) -> Problem:
        self.require_objects()

    def heldout(self, count: int) -> list[Problem]:
        self.require_objects()

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        self.require_objects()
