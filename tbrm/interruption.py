"""SIGTERM and SIGINT (Ctrl-C) let a step finish and its checkpoint be written before the run leaves."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self


class Interrupted(InterruptedError):
    """The run was asked to stop, and has saved what it had."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {where}")
        self.exit_code = 128 + number


class Interruption:
    """Within it the first such signal is only noted, in `signal`; the second one acts as it always does."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
