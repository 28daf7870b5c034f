"""Sees to it that nothing outlives the trainer: neither a server, nor its shared memory, nor the weights handed over to it.

    python guard.py server COMMAND ...
    python guard.py folder FOLDER

It is given a pipe as its stdin, which closes when the trainer is gone, however it went. Then the folder is deleted. Of a
server, the guard leads the process group, which it ends then, or when the command ends by itself, for workers may hang on.
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


def main(kind: str, *arguments: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # not ignored, which the command would inherit
    if kind == "folder":
        sys.stdin.buffer.read()
        while Path(arguments[0]).exists():  # a server that is still there may write into it meanwhile
            shutil.rmtree(arguments[0], ignore_errors=True)
            time.sleep(0.05)
    else:
        threading.Thread(target=watch_trainer).start()
        code = subprocess.Popen(arguments, stdin=subprocess.DEVNULL).wait()
        print(f"the server ended with exit code {code}", flush=True)
        end_group()


def watch_trainer() -> None:
    sys.stdin.buffer.read()
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
