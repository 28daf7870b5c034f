"""Processes that do what must not be done in ours: calls that may hang, run out of memory, crash, or run what they are given.

Each process imports one module and runs its functions, one call at a time. A call that takes too long ends with its
process, and the next call starts a new one. These are new interpreters and not forks or multiprocessing children: they
share no threads, locks or GPU state with the trainer, and they do not import the user's main module again. Once its module
is imported, such a process gives up the rights to all but computing (`tbrm.tasks.sandbox`).
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

_START_SECONDS = 120.0
_KEPT = (
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "DYLD_FALLBACK_LIBRARY_PATH",
    "PYTHONHOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one call: its value, or why there is none."""

    value: Any = None
    failure: str | None = None


class Workers:
    """`count` processes that run the functions of `module`. They start when first needed and end with this object.

    module:        importable name; its functions are called with, and return, what JSON can carry.
    memory_bytes:  address space that each process may use; beyond it the call fails with MemoryError.

    Calls may come from any thread.
    """

    def __init__(self, module: str, count: int, memory_bytes: int) -> None:
        self.count = count
        workers = [_Worker(module, memory_bytes) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            self._idle.put(worker)
        self.close = weakref.finalize(self, _stop_all, workers)

    def call(self, function: str, *arguments: Any, seconds: float) -> Outcome:
        """Run `function` with `arguments` for at most `seconds`.

        Returns its value, or a failure if it raised, took too long, or took its process down. Raises RuntimeError if
        the process cannot start.
        """
        worker = self._idle.get()
        try:
            return worker.call(seconds, function, arguments)
        finally:
            self._idle.put(worker)

    def map(self, function: str, arguments: Sequence[tuple[Any, ...]], *, seconds: float) -> list[Outcome]:
        """`call` for each element of `arguments`, on all the processes at once. Outcomes are in the given order."""
        threads = ThreadPoolExecutor(self.count)
        try:
            return list(threads.map(lambda each: self.call(function, *each, seconds=seconds), arguments))
        finally:
            threads.shutdown(cancel_futures=True)  # after an interrupt, calls not yet begun are not waited for


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()


class _Worker:
    """One process and our end of the socket to it."""

    def __init__(self, module: str, memory_bytes: int) -> None:
        self.module = module
        self.memory_bytes = memory_bytes
        self.folder: TemporaryDirectory[str] | None = None  # an empty one, to stand in
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None

    def call(self, seconds: float, function: str, arguments: tuple[Any, ...]) -> Outcome:
        if self.process is None or self.process.poll() is not None:
            self.start()
        assert self.process is not None and self.connection is not None
        process, connection = self.process, self.connection
        try:
            connection.send_bytes(json.dumps([seconds, function, arguments]).encode())
            if connection.poll(seconds):
                return Outcome(**json.loads(connection.recv_bytes()))
            self.stop()
            return Outcome(failure=f"took longer than {seconds:g} seconds")
        except (EOFError, OSError):  # the socket closed: the process is dead or dying
            self.stop()
            code = process.returncode
            return Outcome(failure=f"took its process down ({f'signal {-code}' if code < 0 else f'exit code {code}'})")
        except BaseException:  # an interrupt: the reply still to come must not be read as that of a later call
            self.stop()
            raise

    def start(self) -> None:
        self.stop()
        self.folder = TemporaryDirectory(prefix="tbrm-grader-")
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-W", "ignore", "-m", "tbrm.tasks.worker_process"]
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), self.module, str(self.memory_bytes)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=self.folder.name,
                env=_environment(self.folder.name),
                start_new_session=True,  # the trainer's terminal is not theirs
            )
        self.connection = Connection(ours.detach())
        try:
            if self.connection.poll(_START_SECONDS) and self.connection.recv_bytes() == b"ready":
                return
            problem = f"was not ready after {_START_SECONDS:g} seconds"
        except (EOFError, OSError):
            problem = "ended before it was ready; its error is above"
        self.stop()
        raise RuntimeError(f"the worker process for {self.module} {problem}")

    def stop(self) -> None:
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.folder is not None:
            self.folder.cleanup()
        self.process = self.connection = self.folder = None


def _environment(folder: str) -> dict[str, str]:
    """No more of ours than an interpreter needs to start: the rest may hold secrets."""
    return {
        **{name: os.environ[name] for name in _KEPT if name in os.environ},
        **dict.fromkeys(("HOME", "TMPDIR"), folder),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "PYTHONHASHSEED": "0",  # some reasoning-gym families draw from sets: make the draws repeatable
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
