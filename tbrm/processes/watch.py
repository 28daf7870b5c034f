"""What becomes of the other processes of a run: none waits for one that has failed, or outlives its launcher.

A process that fails says so where all meet, before anything else ends for it. A thread of each other one looks there, so that
it ends too, whatever its main thread waits in: NCCL, for one, waits for as long as it is allowed to.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from tbrm.training.interruption import ask_this_process

GRACE_SECONDS = 60.0
"""What a process has to end by itself, once another one has failed."""
_LOOK_SECONDS = 1.0
_ROLL_CALL_SECONDS = 10.0
_FIRST = "first failure"


class ProcessLostError(RuntimeError):
    """Another process of the run has failed, or does not answer any more; the message names it."""


class Watch:
    """Of one process over the others, through a store that all reach. It begins at once."""

    def __init__(self, store: dist.Store, rank: int, size: int, *, under_launcher: bool, hosts_store: bool) -> None:
        """`under_launcher`: the parent lives as long as the run does. `hosts_store`: the store ends with this process."""
        # Its own connection: a call that waits in a store holds up all others over the same one.
        self._store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._others = rank, [other for other in range(size) if other != rank]
        self._name = f"rank {rank} on {socket.gethostname()}"
        self._parent = os.getppid() if under_launcher else None
        self._hosts_store = hosts_store
        self._ended = threading.Event()
        self._store.set(f"name/{rank}", self._name)
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def report(self, error: BaseException) -> None:
        """Tells the others that this process has failed."""
        with suppress(RuntimeError):  # the store is gone: so are those that could be told
            self._store.compare_set(_FIRST, "", f"{self._name} has failed: {type(error).__name__}: {error}")
            self._store.set(f"knows/{self._rank}", "")
            if self._hosts_store:
                self._wait_until_all_know()

    def culprit(self, timeout: int) -> str:
        """Once a collective, which may take `timeout` seconds, has failed: what another process says it failed of, or those
        that say nothing within some seconds; "" if all have failed of the same."""
        if not self._others:
            return ""
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        try:
            self._store.set(f"failed/{self._rank}", "")
            while time.monotonic() < deadline:
                if failure := self._failure():
                    return failure
                if self._store.check([f"failed/{other}" for other in self._others]):
                    return ""
                time.sleep(0.2)
            missing = [other for other in self._others if not self._store.check([f"failed/{other}"])]
            names = ", ".join(self._store.get(f"name/{other}").decode() for other in missing)
            return (
                f"no answer from {names}: died, or hung for longer than parallel.timeout ({timeout} s)" if names else ""
            )
        except RuntimeError:
            return "no answer from the process where all meet: it died"

    def _wait_until_all_know(self) -> None:
        """Or for some seconds."""
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        keys = [f"knows/{other}" for other in self._others]
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _failure(self) -> str:
        return self._store.get(_FIRST).decode() if self._store.check([_FIRST]) else ""

    def _run(self) -> None:
        heard = True
        while not self._ended.wait(_LOOK_SECONDS):
            if self._parent is not None and os.getppid() != self._parent:
                self._parent = None
                ask_this_process()  # as the launcher would: what is done is saved
            heard = heard and self._listen()

    def _listen(self) -> bool:
        """False: the store is gone, and with it whoever could say something."""
        try:
            if failure := self._failure():
                self._store.set(f"knows/{self._rank}", "")
        except RuntimeError:
            return False
        if failure:
            self._leave(failure)
        return True

    def _leave(self, failure: str) -> None:
        if not self._ended.wait(GRACE_SECONDS):
            print(f"tbrm: rank {self._rank}: {failure}", file=sys.stderr, flush=True)
            os._exit(1)
