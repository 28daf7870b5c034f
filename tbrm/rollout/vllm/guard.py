"""Sees to it that nothing outlives the trainer: neither a server, nor its shared memory, nor the weights handed over to it.

    python guard.py server COMMAND ...
    python guard.py folder FOLDER

It is given a pipe as its stdin, which closes when the trainer is gone, however it went. Then the folder is deleted. Of a
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
from contextlib import suppress
from pathlib import Path

PATIENCE = 10.0
"""Seconds for the group to end when asked."""

shared: set[str] = set()
"""Files in shared memory that processes of the group were seen to hold."""


def main(kind: str, *arguments: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # not ignored, which the command would inherit
    if kind == "folder":
        sys.stdin.buffer.read()
        while Path(arguments[0]).exists():  # a server that is still there may write into it meanwhile
            shutil.rmtree(arguments[0], ignore_errors=True)
            time.sleep(0.05)
    else:
        threading.Thread(target=watch_trainer).start()
        server = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
        while server.returncode is None:
            note_shared()  # all along: when one process is killed, the others may be gone before anybody looks
            with suppress(subprocess.TimeoutExpired):
                server.wait(1.0)
        print(f"the server ended with exit code {server.returncode}", flush=True)
        end_group()


def watch_trainer() -> None:
    sys.stdin.buffer.read()
    end_group()


def end_group() -> None:
    """Ends the others of the group, by force if asking does not help, and the guard itself."""
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while others := others_in_group():
        note_shared()
        if time.monotonic() > deadline:
            for pid in others:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    # vLLM takes its shared memory and semaphores with it, but not when one of its processes was killed.
    for path in list(shared):
        Path(path).unlink(missing_ok=True)
    os._exit(0)


def note_shared() -> None:
    shared.update(shared_by(os.getpgrp()))


def others_in_group() -> list[int]:
    return [pid for pid in members(os.getpgrp()) if pid != os.getpid()]


def kill_group(group: int) -> None:
    """What the trainer does where the guard itself was killed."""
    left = shared_by(group)
    while members(group):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.05)
    for path in left:
        Path(path).unlink(missing_ok=True)


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
    with os.scandir("/dev/shm") as files:
        return {file.path for file in files if file.inode() in numbers}


if __name__ == "__main__":
    main(*sys.argv[1:])
