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


def forked(
    processes: int, *command: str | Path, check: bool = True, timeout: int = 600, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As `torchrun`, or `python -m COMMAND` alone, of what is imported already: what is read as a module is imported, such as
    HF_HUB_OFFLINE, is not read again."""
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(processes)]
        places = [
            meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)
        ]
        started = [
            _FORKS.Process(
                target=_work, args=([*map(str, command)], cwd or Path.cwd(), {**os.environ, **place}, output)
            )
            for place, output in zip(places, outputs, strict=True)
        ]
        for process in started:
            process.start()
        try:
            for process in started:
                process.join(timeout)
            status = max(abs(code) if code is not None else 1 for code in (each.exitcode for each in started))
        finally:
            for process in started:
                process.kill()
                process.join()
        out, err = (
            "".join(output.with_suffix(suffix).read_text() for output in outputs) for suffix in (".out", ".err")
        )
    assert not check or status == 0, err[-10_000:]
    return subprocess.CompletedProcess(command, status, out, err)


def _work(command: list[str], cwd: Path, env: Mapping[str, str], output: Path) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
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
