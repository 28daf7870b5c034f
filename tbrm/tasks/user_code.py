"""Exceptions of users' own graders: shown as theirs, with the response that they fail on."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tbrm.tasks.task import Problem
from tbrm.tasks.time_limit import TooLateError

Result = TypeVar("Result")
_OURS = Path(__file__).parent.parent
_PLACING_SECONDS = 1.0  # or as long as the call took that failed


class UserCodeError(RuntimeError):
    """What a user's grader raised is its cause."""

    own_traceback: str = ""
    """Of the cause, from where it leaves our code: text, as another process may be the one that shows it."""


def explained(
    grader: str, call: Callable[[slice], Result], problems: Sequence[Problem], responses: Sequence[str]
) -> Result:
    """`call` of all responses. Raises UserCodeError if it raises, or wants to exit; then parts of them are tried, to find the
    one that it fails on."""
    start = time.monotonic()
    try:
        return call(slice(None))
    except (UserCodeError, TooLateError):
        raise
    except (Exception, SystemExit) as error:
        did = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {error!r}"
        took = time.monotonic() - start
        place = _place(call, len(responses), type(error), max(took, _PLACING_SECONDS))
        failure = UserCodeError(f"{grader} {did} {_where(place, problems, responses)}")
        failure.own_traceback = _own_traceback(error)
        raise failure from error


def _own_traceback(error: BaseException) -> str:
    trace = rest = error.__traceback__
    while rest is not None:
        ours = Path(rest.tb_frame.f_code.co_filename).is_relative_to(_OURS)
        rest = rest.tb_next
        trace = rest if ours else trace
    return "".join(traceback.format_exception(type(error), error, trace))


def _where(place: range | None, problems: Sequence[Problem], responses: Sequence[str]) -> str:
    if place is None:
        return "on all responses together, and not on one alone"
    if len(place) > 1:
        return (
            f"on one of responses {place.start + 1} to {place.stop} of {len(responses)}; no time was left to say which"
        )
    asked = problems[place.start].messages[-1]["content"]
    return f"on the response {responses[place.start]!r:.200} to {asked!r:.200}"


def _place(call: Callable[[slice], object], count: int, kind: type[BaseException], seconds: float) -> range | None:
    """The first response that `call` fails on in the same way when it is given that one alone; None if there is none.
    Several neighbours if it is not found within `seconds`."""

    def fails(start: int, stop: int) -> bool:
        try:
            call(slice(start, stop))
        except (Exception, SystemExit) as error:
            return type(error) is kind
        return False

    until = time.monotonic() + seconds
    start, stop = 0, count
    while stop - start > 1 and time.monotonic() < until:
        middle = (start + stop) // 2
        if fails(start, middle):
            stop = middle
        elif fails(middle, stop):
            start = middle
        else:
            return None
    return range(start, stop)
