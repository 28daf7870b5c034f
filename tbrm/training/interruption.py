"""SIGTERM and SIGINT (Ctrl-C) let a step finish and its checkpoint be written before the run leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

AGAIN_SECONDS = {signal.SIGINT: 1.0, signal.SIGTERM: 10.0}
"""After the first signal, from when on another one is a second. Sooner it is the first once more: a scheduler that signals
every process of a job reaches each directly and through its launcher. SIGINT is a person's, at a terminal."""


class Interrupted(InterruptedError):
    """The run was asked to stop, and has saved what it had."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {where}")
        self.exit_code = 128 + number


def ask_this_process() -> None:
    """SIGTERM, of this process to itself: what it finds out by itself is never a second signal, nor makes another one that."""
    Interruption.asks_itself = True
    os.kill(os.getpid(), signal.SIGTERM)


class Interruption:
    """Within it the first such signal is only noted, in `signal`; a second one acts as it always does. A thread that is not
    the main one has no say in signals, and notes none."""

    asks_itself = False
    """Whether the next signal is this process's own."""

    def __init__(self, *, says: bool = True) -> None:
        """`says`: to stderr, what is waited for after the first one."""
        self.signal = 0
        self._says = says
        self._finishing = "the step"
        self._noted_at: float | None = None
        """When the first one from outside was."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.signal, self._noted_at = 0, None
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number in AGAIN_SECONDS if in_main_thread else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    @contextmanager
    def finishing(self, what: str) -> Iterator[None]:
        """What is under way in here, and finished before the run is left."""
        before, self._finishing = self._finishing, what
        try:
            yield
        finally:
            self._finishing = before

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if Interruption.asks_itself:
            Interruption.asks_itself = False
        elif self._noted_at is None:
            self._noted_at = time.monotonic()
            if self._says:
                self._say(signal.Signals(number))
        elif time.monotonic() - self._noted_at >= AGAIN_SECONDS[signal.Signals(number)]:
            self.__exit__()
            signal.raise_signal(number)

    def _say(self, number: signal.Signals) -> None:
        again = "Ctrl-C once more stops" if number == signal.SIGINT else "another SIGTERM, after ten seconds, stops"
        text = (
            f"{self._finishing} under way is finished and a checkpoint written before the run is left; {again} at once"
        )
        with suppress(OSError):  # nobody may be there to read it
            os.write(2, f"\n{number.name}: {text}\n".encode())  # as print may not in the middle of another print
