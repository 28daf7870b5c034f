"""Sees to it that nothing outlives the trainer: neither a server, nor its shared memory, nor the weights handed over to it.

    python guard.py server COMMAND ...
    python guard.py folder FOLDER ...

It is given a pipe as its stdin, which closes when the trainer is gone, however it went. Then the folders are deleted. Of a
server, the guard leads the process group, which it ends then, or when the command ends by itself, for workers may hang on.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

Left = TypeVar("Left")

PATIENCE = 10.0
"""Seconds for the group to end when asked; as many more when forced; and for a folder to be deleted."""

shared: set[str] = set()
"""Files in shared memory that processes of the group were seen to hold."""


def main(kind: str, *arguments: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # not ignored, which the command would inherit
    if kind == "folder":
        sys.stdin.buffer.read()
        delete(*arguments)
    else:
        threading.Thread(target=watch_trainer).start()
        try:
            run_server(arguments)
        except BaseException:  # to the log; a server is not left without a guard
            traceback.print_exc()
        end_group()


def run_server(command: Sequence[str]) -> None:
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while server.returncode is None:
        note_shared()  # all along: when one process is killed, the others may be gone before anybody looks
        with suppress(subprocess.TimeoutExpired):
            server.wait(1.0)
    print(f"the server ended with exit code {server.returncode}", flush=True)


def watch_trainer() -> None:
    sys.stdin.buffer.read()
    end_group()


def delete(*folders: str) -> None:
    """A server that is still there may write into them meanwhile."""

    def delete_once() -> list[str]:
        found = [folder for folder in folders if Path(folder).exists()]
        for folder in found:
            shutil.rmtree(folder, ignore_errors=True)
        return found

    until(delete_once)


def end_group() -> None:
    """Ends the others of the group, by force if asking does not help, and the guard itself."""
    try:
        os.killpg(0, signal.SIGTERM)
        if until(others_in_group):
            kill_others()
        # vLLM takes its shared memory and semaphores with it, but not when one of its processes was killed.
        for path in list(shared):
            Path(path).unlink(missing_ok=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def kill_others() -> None:
    def kill() -> list[int]:
        others = others_in_group()
        for pid in others:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
        return others

    if left := until(kill):
        print(f"processes {left} of the server could not be killed", flush=True)


def until(left: Callable[[], list[Left]]) -> list[Left]:
    """Calls it again and again, until nothing is left or the time is over. Returns what is left."""
    deadline = time.monotonic() + PATIENCE
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def note_shared() -> None:
    shared.update(shared_by(os.getpgrp()))


def others_in_group() -> list[int]:
    note_shared()
    return [pid for pid in members(os.getpgrp()) if pid != os.getpid()]


def kill_group(group: int) -> list[int]:
    """What the trainer does where the guard itself was killed. Returns the processes that are left, which nothing can kill."""
    left = shared_by(group)

    def kill() -> list[int]:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        return members(group)

    processes = until(kill)
    for path in left:
        Path(path).unlink(missing_ok=True)
    return processes


def members(group: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rpartition(") ")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def shared_by(group: int) -> set[str]:
    """By number, not name: one who made a semaphore has it mapped by a name that it had before its own."""
    numbers: set[int] = set()
    for pid in members(group):
        with suppress(OSError):  # it has just ended
            held = re.findall(r"(\d+) +/dev/shm/", Path(f"/proc/{pid}/maps").read_text())
            numbers.update(map(int, held))
    if not numbers:  # some systems have no such folder
        return set()
    with os.scandir("/dev/shm") as files:
        return {file.path for file in files if file.inode() in numbers}


if __name__ == "__main__":
    main(*sys.argv[1:])
