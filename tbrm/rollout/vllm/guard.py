"""Sees to it that nothing outlives the trainer: neither a server, nor its shared memory, nor the weights handed over to it.

    python guard.py FOLDER [COMMAND ...]

It leads a process group, runs the command in that group, and is given a pipe as its stdin. When the command ends, so does
what is left of the group. When the pipe closes, which it does however the trainer is gone, the group ends too, and FOLDER is
deleted, unless the trainer has said "keep" before.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PATIENCE = 10.0
"""Seconds for the group to end when asked: only then does vLLM take its shared memory with it."""


def main(folder: str, *command: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # not ignored, which the command would inherit
    threading.Thread(target=watch_trainer, args=[folder]).start()
    if command:
        code = subprocess.Popen(command, stdin=subprocess.DEVNULL).wait()
        print(f"the server ended with exit code {code}", flush=True)
        end_group()


def watch_trainer(folder: str) -> None:
    said = sys.stdin.buffer.read()
    if said != b"keep":
        shutil.rmtree(folder, ignore_errors=True)
    end_group()


def end_group() -> None:
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while others_in_group() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


def others_in_group() -> bool:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = path.read_text().partition(" (")
        except OSError:  # it has just ended
            continue
        state, _, group = rest.rpartition(") ")[2].split()[:3]
        if int(group) == os.getpgrp() and int(pid) != os.getpid() and state != "Z":
            return True
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
