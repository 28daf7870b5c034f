"""The other end of `tbrm.tasks.workers`: ``python -m tbrm.tasks.worker_process SOCKET MODULE MEMORY_BYTES``."""

from __future__ import annotations

import importlib
import json
import math
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from tbrm.tasks.sandbox import confine


def main(socket: int, module_name: str, memory_bytes: int) -> None:
    """Answer calls until the other end closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends us in its own time
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    connection = Connection(socket)
    module = importlib.import_module(module_name)
    confine()
    connection.send_bytes(b"ready")
    while True:
        try:
            seconds, function, arguments = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # The trainer kills us when the time is up. If it is gone, this alarm does: its default action ends the process.
        signal.alarm(math.ceil(seconds) + 2)
        reply = _run(getattr(module, function), arguments)
        signal.alarm(0)
        connection.send_bytes(reply)


def _run(function: Any, arguments: list[Any]) -> bytes:
    try:
        return json.dumps({"value": function(*arguments)}).encode()
    except Exception as error:  # MemoryError and RecursionError among them
        return json.dumps({"failure": f"{type(error).__name__}: {error}"[:500]}).encode()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
