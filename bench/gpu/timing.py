"""Time on a device: events around the work, caches flushed before it, and the clock that it ran at."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.shapes import DEVICE

FLUSH_BYTES = 256 * 2**20  # several times an L2 cache
AHEAD = (
    2 * 10**6
)  # cycles, about a millisecond, in which the program queues its kernels, as behind a model's forward pass
FEWEST, MOST = (7, 50) if DEVICE.type == "cuda" else (2, 4)


class Stopwatch:
    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSH_BYTES // 4 if DEVICE.type == "cuda" else 1, dtype=torch.int32)
        self._mhz: list[int] = []
        self._has_clock = DEVICE.type == "cuda" and has_clock()

    def milliseconds(self, step: Callable[[], object]) -> float:
        self._flushed.zero_()
        if DEVICE.type != "cuda":
            begun = time.perf_counter()
            step()
            return (time.perf_counter() - begun) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(AHEAD)
        start.record()
        step()
        end.record()
        if self._has_clock:
            self._mhz.append(torch.cuda.clock_rate())  # while the device is at work
        end.synchronize()
        return start.elapsed_time(end)

    def clock(self) -> dict[str, int]:
        """Of the multiprocessors, since the last call, in MHz: an idle clock would explain a slow row."""
        taken, self._mhz = self._mhz, []
        return {"mhz": int(median(taken)), "least_mhz": min(taken)} if taken else {}


def has_clock() -> bool:
    """The driver's library may be missing, or its Python package: then there are times and no clock."""
    try:
        torch.cuda.clock_rate()
    except Exception as error:
        print(f"no clock: {error}", flush=True)
        return False
    return True


def in_turns(
    watch: Stopwatch,
    ours: Callable[[], object],
    bare: Callable[[], object],
    clear: Callable[[], object],
    seconds: float,
) -> dict[str, Any]:
    """Both, one after the other and again, so that whatever the card does meanwhile happens to both; after a first round."""
    for step in (ours, bare):
        step()
        clear()
    watch.clock()
    times: list[tuple[float, float]] = []
    begun = time.perf_counter()
    while len(times) < FEWEST or (time.perf_counter() - begun < seconds and len(times) < MOST):
        first = watch.milliseconds(ours)
        clear()
        times.append((first, watch.milliseconds(bare)))
        clear()
    mine, floor = zip(*times, strict=True)
    return {
        "ms": median(mine),
        "floor_ms": median(floor),
        "over_floor": median(mine) / median(floor),
        "least_over_floor": min(mine) / min(floor),
        "repeats": len(times),
        **watch.clock(),
    }
