"""What a run tells Python code of itself while it goes, and asks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tbrm.rollout.evaluate import Evaluation

if TYPE_CHECKING:
    from tbrm.training.trainer import Trainer


class Callback:
    """Base of all callbacks, with methods that do nothing. Of several processes each calls its own; an exception ends the
    run."""

    def start(self, trainer: Trainer) -> None:
        """Before the first step and the evaluation before it, also of a run that goes on."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each step, with its line of metrics.jsonl."""

    def evaluation(self, step: int, result: Evaluation) -> None:
        """After each evaluation, which is of the weights after `step` steps."""

    def stop(self) -> bool:
        """Whether the step just taken is to be the last one, evaluated and saved as such; asked after each."""
        return False


class Callbacks(Callback):
    """Several as one, in their order."""

    def __init__(self, members: Sequence[Callback]) -> None:
        self.members = tuple(members)

    def start(self, trainer: Trainer) -> None:
        for member in self.members:
            member.start(trainer)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        for member in self.members:
            member.step(step, metrics)

    def evaluation(self, step: int, result: Evaluation) -> None:
        for member in self.members:
            member.evaluation(step, result)

    def stop(self) -> bool:
        return any([member.stop() for member in self.members])
