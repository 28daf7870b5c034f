"""A process for each case: its peak memory is its own, and if it takes more than there is, it alone is killed.

The parent asks with a line on the worker's standard input, the name of one of `Case`'s methods, and gets a line of JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.problem import Problem
from bench.shapes import DEVICE, DTYPES
from bench.ways import WAYS, step_of

CHECKED_TOKENS = 64
SPARE_MIB = 1024  # left to everything else on the machine


class WorkerFailed(Exception):
    """The message is the table's note."""


class Worker:
    """The parent's side."""

    def __init__(self, *case: str, module: str = "bench.worker") -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, question: str) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(question + "\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.05)[0]:
            if _mib("/proc/meminfo", "MemAvailable") < SPARE_MIB:
                taken = _mib(f"/proc/{process.pid}/status", "VmRSS")
                raise WorkerFailed(f"out of memory: took {taken / 1024:.0f} GiB and more")
        if answer := process.stdout.readline():
            return json.loads(answer)
        process.wait()
        self._errors.seek(0)
        raise WorkerFailed((self._errors.read().strip().splitlines() or [f"signal {-process.returncode}"])[-1][:200])

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def _mib(path: str, name: str) -> float:
    lines = Path(path).read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)  # a zombie has no VmRSS


class Case:
    """The worker's side."""

    def __init__(self, way: str, vocab: str, tokens: str, dtype: str) -> None:
        self.way, self.vocab, self.tokens, self.dtype = way, int(vocab), int(tokens), DTYPES[dtype]

    def check(self) -> dict[str, float]:
        """The errors of loss and gradients, if the way makes any."""
        if self.way not in WAYS:
            return {}
        problem = Problem(self.vocab, CHECKED_TOKENS, self.dtype)
        loss = WAYS[self.way](problem)
        loss.backward()
        return problem.errors(loss.detach())

    def small_step(self) -> dict[str, float]:
        step = step_of(self.way, Problem(self.vocab, CHECKED_TOKENS, self.dtype))
        start = time.perf_counter()
        step()
        wait_for_device()
        return {"seconds": time.perf_counter() - start}

    def prepare(self) -> dict[str, float]:
        self.problem = Problem(self.vocab, self.tokens, self.dtype)
        self.step_of_way = step_of(self.way, self.problem)
        self.before = begin_peak_anew()
        return {}

    def step(self) -> dict[str, float]:
        """What the steps so far have added at most to a process that holds the inputs, gradients included."""
        self.problem.hidden.grad = self.problem.weight.grad = None
        self.step_of_way()
        wait_for_device()
        return {"peak_mib": taken_mib(peak=True) - self.before}


def wait_for_device() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def begin_peak_anew() -> float:
    """What this process takes now, in MiB: the least that its peak can be from here on."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return taken_mib()


def taken_mib(*, peak: bool = False) -> float:
    """Memory of the device where things are computed, that this process takes or at its peak took."""
    if DEVICE.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    return _mib("/proc/self/status", "VmHWM" if peak else "VmRSS")


def serve(make_case: Callable[..., object]) -> None:
    """Answers the parent's questions about the case that the command line names."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    case = make_case(*sys.argv[1:])
    for question in sys.stdin:
        answers.write(json.dumps(getattr(case, question.strip())()) + "\n")
        answers.flush()


if __name__ == "__main__":
    torch.set_default_device(DEVICE)
    serve(Case)
