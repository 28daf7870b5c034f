"""Exceptions of users' own graders: shown as theirs, with the response that they fail on."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tbrm.tasks.base import Problem
from tbrm.tasks.time_limit import TooLateError

Result = TypeVar("Result")
_OURS = Path(__file__).parent.parent


class UserCodeError(RuntimeError):
    """What a user's grader raised is its cause."""

    def own_traceback(self) -> str:
        """Of the cause, from where it leaves our code."""
        assert self.__cause__ is not None
        trace = rest = self.__cause__.__traceback__
        while rest is not None:
            ours = Path(rest.tb_frame.f_code.co_filename).is_relative_to(_OURS)
            rest = rest.tb_next
            trace = rest if ours else trace
        return "".join(traceback.format_exception(type(self.__cause__), self.__cause__, trace))


def explained(
    grader: str, call: Callable[[slice], Result], problems: Sequence[Problem], responses: Sequence[str]
) -> Result:
    """`call` of all responses. Raises UserCodeError if it raises, or wants to exit; then parts of them are tried, to find the
    one that it fails on."""
    try:
        return call(slice(None))
    except (UserCodeError, TooLateError):
        raise
    except (Exception, SystemExit) as error:
        did = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {error!r}"
        place = _place(call, len(responses), type(error))
        where = "on all responses together, and not on one alone"
        if place is not None:
            where = f"on the response {responses[place]!r:.200} to {problems[place].messages[-1]['content']!r:.200}"
        raise UserCodeError(f"{grader} {did} {where}") from error


def _place(call: Callable[[slice], object], count: int, kind: type[BaseException]) -> int | None:
    """The first response that `call` fails on in the same way when it is given that one alone; None if there is none."""

    def fails(start: int, stop: int) -> bool:
        try:
            call(slice(start, stop))
        except (Exception, SystemExit) as error:
            return type(error) is kind
        return False

    start, stop = 0, count
    while stop - start > 1:
        middle = (start + stop) // 2
        if fails(start, middle):
            stop = middle
        elif fails(middle, stop):
            start = middle
        else:
            return None
    return start
