"""Processes that tests start: several by torchrun, as users do, or several that have everything imported already.

To import torch, transformers and the trainer takes a core some seven seconds. Where a test is about what several processes do,
not about how they start, they are forked from one that has done that, and has computed nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tbrm.training.trainer", "tests.tbrm.conftest"])


def torchrun(
    processes: int,
    *command: str | Path,
    check: bool = True,
    options: tuple[str, ...] = (),
    timeout: int = 600,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python -m COMMAND` in so many processes."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        [*launcher, "-m", *map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def forked(processes: int, *command: str | Path, timeout: int = 600) -> str:
    """`python -m COMMAND` in so many processes, or in one without a launcher, and what they wrote to stdout."""
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(processes)]
        places = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        started = [
            _FORKS.Process(target=_work, args=([str(x) for x in command], place if processes > 1 else {}, output))
            for place, output in zip(places, outputs, strict=True)
        ]
        for process in started:
            process.start()
        try:
            for process in started:
                process.join(timeout)
            failed = [process.exitcode for process in started]
        finally:
            for process in started:
                process.kill()
                process.join()
        said = [output.with_suffix(".err").read_text() for output in outputs]
        assert not any(failed), "\n".join(f"rank {rank}: ...{text[-3000:]}" for rank, text in enumerate(said))
        return "".join(output.with_suffix(".out").read_text() for output in outputs)


def _work(command: list[str], place: Mapping[str, str], output: Path) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(place)
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        file = os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
    module, *sys.argv[1:] = command
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
