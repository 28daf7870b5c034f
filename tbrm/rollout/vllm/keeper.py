"""Keeps servers alive and up to date: one thread per server, on the main process alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from tbrm.reporting.progress import tell
from tbrm.rollout.vllm.connection import LateError, RefusedError, ServerError
from tbrm.rollout.vllm.process import ServerProcess
from tbrm.rollout.vllm.server import Server

_POLL_SECONDS = 1.0
_QUICK = 10.0
"""Seconds for an answer that takes no work."""


class Keeper:
    """Looks after one server: starts it again if it is ours and ended; and whenever it has other weights than it should
    (new ones are out, it is new, it comes back from the dead), sends it the newest."""

    def __init__(
        self,
        server: Server,
        send: Callable[[Server], None],
        start: Callable[[], ServerProcess] | None = None,
        examine: Callable[[Server], None] | None = None,
    ) -> None:
        """`start` makes the process of a server of ours. One given by address has none, but `examine`, which raises
        RefusedError if it cannot be used."""
        self.server = server
        self.has = ""
        """The tag of the weights that it is known to have."""
        self.failure: BaseException | None = None
        """Why it does not have those it should, once that is known."""
        self.restarts = 0
        self.max_model_len = 0
        self._wanted = ""
        self._send = send
        self._start = start
        self._examine = examine
        self._process: ServerProcess | None = None
        self._was_up = False
        self._had_ours = False
        self._answers = False  # and has done so since it was started last
        self._is_shared = False
        self._closed = False
        self._lock = threading.Lock()  # of the process's start and end
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def want(self, tag: str) -> None:
        """From now on the server should have the weights that can now be sent, and call them `tag`."""
        self.failure = None
        self._wanted = tag
        self._wake.set()
        if self._thread.ident is None:
            self._thread.start()

    def restart(self, generation: int) -> None:
        """Ends a server of ours that does not answer; what it was asked fails, and a new one comes. `generation` is what
        `restarts` was when it was asked: many requests may find out, but the new one shall live."""
        with self._lock:
            if self._process is not None and self.restarts == generation:
                self._process.stop()

    def last_words(self) -> str:
        return f"\n{self._process.last_words()}" if self._process else ""

    @property
    def hopeless(self) -> bool:
        """Whether trying longer makes no sense: it has never come up, or was never of use and fails in a way that stays."""
        if not self._was_up and self._process is not None and self._process.ended:
            return True
        return not self._had_ours and not isinstance(self.failure, ServerError | OSError | None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.stop()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_QUICK)

    def _run(self) -> None:
        while not self._closed:
            try:
                self._tend()
            except BaseException as error:  # whatever it is: this thread has nobody else to tell
                self.has, self.failure = "", error
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()

    def _tend(self) -> None:
        if self._start is not None and not self._is_running(self._start):
            return
        tag = self._wanted
        try:
            found = self.server.weights(timeout=_QUICK)
        except ServerError as error:
            if self._answers and not isinstance(error, LateError):
                self.restart(self.restarts)  # it is there, but broken: it may never end by itself
            raise
        self._was_up = self._answers = True
        if found != tag:
            self._note_another_run(found)
            self.max_model_len = self.server.max_model_len()
            if self._examine is not None and not self.has:
                self._examine(self.server)
            try:
                self.server.load(self._send, tag)
            except LateError:
                raise
            except ServerError:
                self.restart(self.restarts)  # whatever is wrong with it, it has no good weights now
                raise
        self.has, self._had_ours = tag, True

    def _note_another_run(self, found: str) -> None:
        if not self.has or found == self.has or self._is_shared:
            return
        self._is_shared = True
        tell(
            f"{self.server.address} was given weights {found!r}, which are not ours: another run uses it, too, and each makes "
            "the other ask again. One server belongs to one run at a time (rollout.vllm.addresses)"
        )

    def _is_running(self, start: Callable[[], ServerProcess]) -> bool:
        with self._lock:
            if self._closed or self.hopeless:
                return False
            if self._process is None:
                self._process = start()
            elif self._process.ended:
                tell(
                    f"a vLLM server has ended and is started again, which takes as long as at first; {self._process.log}"
                )
                self._process.stop()
                self._process = start()
                self._answers = False
                self.restarts += 1
            return True


def publish(keepers: Sequence[Keeper], tag: str, *, wait_for_all: bool, seconds: float) -> None:
    """Returns when the servers have the weights: all of them, or those that can be had now, at least one. Raises
    ServerError or RefusedError, with what the server said, if there is none within `seconds`."""
    for keeper in keepers:
        keeper.want(tag)
    deadline = time.monotonic() + seconds
    while not all(keeper.has == tag for keeper in keepers):
        has = [keeper.has == tag for keeper in keepers]
        if any(has) and not wait_for_all and all(h or k.failure for h, k in zip(has, keepers, strict=True)):
            return
        lost = [keeper for keeper in keepers if keeper.hopeless]
        if lost or time.monotonic() > deadline:
            keeper = (lost or [k for k in keepers if k.has != tag])[0]
            when = "" if lost else f" within rollout.vllm.start_timeout ({seconds:.0f} s)"
            kind = RefusedError if isinstance(keeper.failure, RefusedError) else ServerError
            raise kind(f"vLLM has no weights{when}: {_told(keeper.failure)}{keeper.last_words()}") from keeper.failure
        time.sleep(0.02)


def _told(failure: BaseException | None) -> str:
    if failure is None:
        return "it did not start"
    explains_itself = isinstance(failure, ServerError | RefusedError | OSError)
    return str(failure) if explains_itself else f"{type(failure).__name__}: {failure}"
