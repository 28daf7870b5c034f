"""Time, peak memory and errors of the fused loss, of other ways to compute it, and of bare matrix products, on one device.

python -m bench.gpu.head build/gpu/head.jsonl

A cell that is begun is a row, and so is what came of it. What takes the process with it (a kernel that never ends or reads past
its memory) is therefore known to the next one, which goes on behind it: `bench/gpu.sh` starts it again until it has ended well.
"""

from __future__ import annotations

import faulthandler
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cells import HEADS, TINY, TINY_TOKENS, TOKENS, Cell, Head, cells, floor_of, operations, step
from bench.gpu.health import device_answers
from bench.gpu.json_lines import append, read
from bench.gpu.timing import Stopwatch, in_turns
from bench.problem import Problem
from bench.shapes import DEVICE
from bench.ways import WAYS
from bench.worker import wait_for_device
from tbrm_kernels.backends import torch_tiles

ON_GPU = DEVICE.type == "cuda"
SECONDS = 1.0 if ON_GPU else 0.2  # of repeats of one cell
LONGEST = 30  # seconds that a cell may take, compilation included


class Measurement:
    def __init__(self) -> None:
        self.tokens = TOKENS if ON_GPU else TINY_TOKENS
        self.watch = Stopwatch()
        self._problems: dict[Head, Problem] = {}
        self._exact: dict[Head, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def problem(self, head: Head) -> Problem:
        """Made once for all cells in a row that are of one head; without gradients that one before may have left."""
        if head not in self._problems:
            self._problems.clear()  # before there are two
            self._problems[head] = Problem(head.vocab, self.tokens, torch.bfloat16, head.width)
        problem = self._problems[head]
        problem.hidden.grad = problem.weight.grad = None
        return problem

    def time(self, cell: Cell) -> dict[str, Any]:
        problem = self.problem(cell.head)
        ours, bare = step(cell.way, problem), step(floor_of(cell.way), problem)

        def clear() -> None:
            problem.hidden.grad = problem.weight.grad = None

        begun = time.perf_counter()
        ours()
        wait_for_device()
        found = {"first_seconds": time.perf_counter() - begun}
        peaks = {"peak_mib": peak_mib(ours, clear), "floor_peak_mib": peak_mib(bare, clear)}
        found |= in_turns(self.watch, ours, bare, clear, SECONDS)
        tflops = operations(cell, self.tokens) / found["ms"] / 1e9
        return {**found, **peaks, "tflops": tflops}

    def errors(self, cell: Cell) -> dict[str, Any]:
        problem = self.problem(cell.head)
        loss = WAYS[cell.way](problem)
        loss.backward()
        found = problem.take_gradients()
        exact_loss, exact = self.exact(cell.head)
        errors = {"error_loss": float((loss.detach().double() - exact_loss).abs() / exact_loss)}
        for name, ours, true in zip(("hidden", "weight"), found, exact, strict=True):
            errors[f"error_{name}"] = float((ours.float() - true).norm(dtype=torch.float64) / true.norm())
        return errors

    def exact(self, head: Head) -> tuple[Tensor, tuple[Tensor, ...]]:
        """In float64; the gradients are kept in float32, whose rounding is far below what is looked for."""
        if head not in self._exact:
            if ON_GPU:  # tiles that keep a large card busy
                torch_tiles.SCRATCH_ELEMENTS, torch_tiles.ROW_CHUNK = 2**26, 4096
            loss, gradients = self.problem(head).exact()
            self._exact[head] = loss, tuple(gradient.float() for gradient in gradients)
        return self._exact[head]


def peak_mib(work: Callable[[], object], clear: Callable[[], object]) -> float | None:
    """Beyond the inputs, gradients included. A CPU's allocator does not give so small amounts back: no figure."""
    clear()
    if not ON_GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    clear()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main(out: Path) -> int:
    ended = {(row["what"], row["head"], row["way"]) for row in read(out)}
    measurement = Measurement()
    for cell in cells(HEADS if ON_GPU else TINY):
        name = {"what": cell.what, "head": cell.head.name, "way": cell.way}
        if tuple(name.values()) in ended:
            continue
        append(out, {**name, "note": "begun, and took the process with it"})
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        try:
            found = getattr(measurement, cell.what)(cell)
        except Exception as error:  # a package that is not there, memory that does not suffice: rows of the table
            found = {"note": f"{type(error).__name__}: {error}"[:300]}
        faulthandler.cancel_dump_traceback_later()
        shape = {"vocab": cell.head.vocab, "width": cell.head.width, "tokens": measurement.tokens}
        append(out, {**name, **shape, **found})
        print(name, found, flush=True)
        if not device_answers():
            return 1
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    torch.set_default_device(DEVICE)
    sys.exit(main(Path(sys.argv[1])))
