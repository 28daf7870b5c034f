"""A run's folder has one owner: who trains in it holds a lock there, which dies with its process, also on a network's file
system."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import IO, Self

from tbrm.config.section import ConfigError
from tbrm.parallel import ALONE, World

LOCK_FILE = ".lock"
_PATIENCE_SECONDS = 30.0
"""For an owner that is about to end: one of a launcher that was killed saves its step first."""

_OF_THIS_PROCESS: dict[Path, RunLock] = {}
"""Those that its threads hold: a file's lock is of the whole process, which loses it where any thread closes the file."""


class RunLock:
    """Held by the main process within its context. Raises ConfigError where another one holds it, which it names."""

    def __init__(self, run_dir: Path, world: World = ALONE, *, resume: bool = False) -> None:
        """`resume`: an owner that is about to end is waited for."""
        self._run_dir = run_dir
        self._world = world
        self._patience = _PATIENCE_SECONDS if resume else 0.0
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self._world.on_main(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()  # and with it the lock goes
            _OF_THIS_PROCESS.pop(self._run_dir.resolve(), None)

    def _take(self) -> None:
        folder = self._run_dir.resolve()
        if _OF_THIS_PROCESS.setdefault(folder, self) is not self:
            raise ConfigError(
                f"run.dir: {str(self._run_dir)!r} is being trained in by another thread of this process. Wait until it has "
                "ended, or give another run.dir"
            )
        try:
            self._lock()
        except BaseException:
            del _OF_THIS_PROCESS[folder]
            raise

    def _lock(self) -> None:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._file = (self._run_dir / LOCK_FILE).open("a+")
        except OSError as error:
            raise ConfigError(f"run.dir: {str(self._run_dir)!r} cannot be written to: {error.strerror}") from error
        deadline = time.monotonic() + self._patience
        while not self._locked():
            if time.monotonic() > deadline:
                raise ConfigError(f"run.dir: {self._refusal()}")
            time.sleep(0.5)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
        self._file.flush()

    def _locked(self) -> bool:
        # fcntl's kind: NFS has it, and a server that we start does not inherit it.
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            print(
                f"run.dir: {str(self._run_dir)!r} cannot be locked ({error.strerror}): let no other run write there",
                file=sys.stderr,
            )
        return True

    def _refusal(self) -> str:
        assert self._file is not None
        self._file.seek(0)
        owner = self._file.read() or "another process"
        self._file.close()
        self._file = None
        return (
            f"{str(self._run_dir)!r} is being trained in by {owner}. Wait until it has ended, end it (kill PID, which saves "
            "its step), or give another run.dir"
        )
