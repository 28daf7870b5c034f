"""A time limit on functions of users, which run in this process: that may be where they are at home, or hold a GPU."""

from __future__ import annotations

import asyncio
import inspect
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import cache
from typing import Any

_SIGNAL = getattr(signal, "SIGRTMAX", signal.SIGUSR2)  # one that nobody else uses; alarms are left to the function
_ALIVE_SECONDS = 1.0  # in which a loop that is not blocked answers


class TooLateError(Exception):
    """The function was left before it returned."""


class _Leave(BaseException):
    """Raised in the function; no Exception, which it may catch."""


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What `function` returns, or what comes of awaiting that. Raises TooLateError.

    In the main thread it is interrupted, in Python code and in calls of the system such as sleep and recv; elsewhere it goes
    on in a thread of its own, and nobody waits for it. One that catches all exceptions, in a loop without end, is never left.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    result = (_interrupted if in_main_thread else _left)(seconds, function)
    if not inspect.isawaitable(result):
        return result
    # One loop for all calls: what a function keeps between them, such as a client of a server, belongs to a loop.
    future = asyncio.run_coroutine_threadsafe(_awaited(result), _loop())
    try:
        return _result(future, seconds)
    except TooLateError:
        _leave_blocked_loop()
        raise


def _interrupted(seconds: float, function: Callable[[], Any]) -> Any:
    """In this thread: functions with alarms of their own, as math-verify has, work in the main thread alone."""
    running, late, done = True, False, threading.Event()
    thread = threading.get_ident()

    def leave(*_: object) -> None:
        nonlocal late
        if running:  # not one that comes late
            late = True
            raise _Leave

    def remind() -> None:
        while not done.wait(seconds):  # again and again: a bare `except:` goes on
            signal.pthread_kill(thread, _SIGNAL)

    signal.signal(_SIGNAL, leave)
    threading.Thread(target=remind, daemon=True).start()
    try:
        result = function()
    except (Exception, SystemExit, _Leave):
        if late:
            raise TooLateError from None
        raise
    finally:
        running = False
        done.set()
    if late:  # it caught what we raised
        raise TooLateError
    return result


def _left(seconds: float, function: Callable[[], Any]) -> Any:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return _result(future, seconds)


def _result(future: Future[Any], seconds: float) -> Any:
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # its own
            raise
        future.cancel()
        raise TooLateError from None


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _leave_blocked_loop() -> None:
    """A call that blocks in an async function keeps the loop: the next calls get another."""
    try:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), _loop()).result(_ALIVE_SECONDS)
    except TimeoutError:
        _loop.cache_clear()
