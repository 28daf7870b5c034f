"""What a person sees while something goes on: bars on a terminal, lines in a log file, and never nothing for long."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0
"""Between two lines where stderr is no terminal."""
_RECENT = 50
"""Steps whose pace says how long the others will take."""

Watch = Callable[[int], None]
"""Is told each time how many more responses there are."""


def unwatched(count: int) -> None:
    """Who is told of responses where nobody watches."""


def tell(line: str) -> None:
    """Prints `line` to stderr, above what bars there are."""
    tqdm.write(line, file=sys.stderr)


@contextmanager
def alive(what: str, responses: int = 0, *, shown: bool = True) -> Iterator[Watch]:
    """Shows that `what` goes on, for how long already and, of so many `responses`, how many there are: on a terminal in a line
    that goes when it is over, elsewhere in one every LOG_SECONDS."""
    if not shown:
        yield unwatched
        return
    count = "{n_fmt}/{total_fmt} responses {bar} " if responses else ""
    bar = tqdm(
        total=responses,
        desc=what,
        bar_format=f"{{desc}}: {count}{{elapsed}}",
        disable=None,
        leave=False,
        dynamic_ncols=True,
    )
    begun, done, over = time.monotonic(), 0, threading.Event()

    def watch(more: int) -> None:
        nonlocal done
        done += more
        bar.update(more)

    def tick() -> None:
        while not over.wait(LOG_SECONDS if bar.disable else 1.0):
            if bar.disable:
                there = f"{done} of {responses} responses after " if responses else ""
                print(f"{what}: {there}{time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
            else:
                bar.refresh()

    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    try:
        yield watch
    finally:
        over.set()
        ticking.join()
        bar.close()


class Progress:
    """The steps of a run: a bar on a terminal; elsewhere a line with the same figures after the first step, and then one every
    LOG_SECONDS at most."""

    def __init__(self, steps: int, done: int = 0) -> None:
        """`steps` in all, of which `done` were run before (when resuming)."""
        self._steps = steps
        self._done = done
        self._heldout: list[str] = []
        self._ends = deque([time.monotonic()], maxlen=_RECENT)
        """When the latest steps ended; before the first, when it began."""
        self._logged_at: float | None = None
        bar_format = "step {n_fmt}/{total_fmt} {bar} {desc}"
        self._bar = tqdm(total=steps, initial=done, bar_format=bar_format, disable=None, dynamic_ncols=True)

    def advance(self, metrics: Mapping[str, Any]) -> None:
        """One more step is done, with these metrics."""
        now = time.monotonic()
        self._done += 1
        self._ends.append(now)
        figures = ", ".join([self._left(), *self._heldout, *_shown(metrics)])
        self._bar.set_description_str(figures, refresh=False)
        self._bar.update()
        if self._bar.disable and (self._logged_at is None or now - self._logged_at >= LOG_SECONDS):
            self._logged_at = now
            print(f"step {self._done}/{self._steps}: {figures}", file=sys.stderr, flush=True)

    def evaluated(self, accuracy: float, reward_mean: float) -> None:
        """Held-out problems were answered, and so well."""
        self._heldout = [f"held-out {accuracy:.1%} (reward {reward_mean:.2f})"]
        if len(self._ends) == 1:  # that was before the first step
            self._ends[0] = time.monotonic()

    def say(self, line: str) -> None:
        """Prints `line` to stdout, above the bar if there is one."""
        self._bar.write(line)
        sys.stdout.flush()  # a log file shows it now

    def _left(self) -> str:
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return f"{tqdm.format_interval(round(pace * (self._steps - self._done)))} left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _shown(metrics: Mapping[str, Any]) -> list[str]:
    texts = {"reward_mean": "reward {:.2f}", "tokens_per_second": "{:.0f} tokens/s"}
    return [text.format(metrics[key]) for key, text in texts.items() if key in metrics]
