"""Time and peak memory of the TBRM loss, forward and backward, beside the three bare products that nobody can do without.

    make bench                                       # all of it, two hours on two cores, and the table and plots
    make bench SHAPES="32768x1024"                   # vocabulary x tokens: DESIGN.md's one shape, minutes

Each way is checked against float64 before it is timed, at the same vocabulary and 64 tokens. Compare rows of one run
only: machines are noisy.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from bench.shapes import DTYPES, shapes
from bench.ways import FLOOR, ONE_PRODUCT, SCORING, WAYS
from bench.worker import CHECKED_TOKENS, Worker, WorkerFailed

LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 3e-2}  # of the loss and of each gradient, relative
MOST_ROUNDS = 31
SECONDS = 8  # of rounds, if that is more than one: other work of the machine comes in bursts of two or three
WARM_UP_BELOW = 120  # expected seconds of a step; a longer one is taken once, without one before it

Checks = dict[tuple[str, int, str], tuple[dict[str, float], float]]


@pytest.fixture(scope="session")
def checks() -> Checks:
    """Of each way, vocabulary and dtype, found once for all numbers of tokens: errors, and seconds of a step of CHECKED_TOKENS.
    Even that is long for some ways, since a small step, too, makes all of the weight's gradient."""
    return {}


@pytest.mark.parametrize("way", [FLOOR, *WAYS, ONE_PRODUCT, SCORING])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "tokens"), shapes())
def test_loss_and_gradients(
    benchmark: Any, failures: list[dict[str, Any]], checks: Checks, vocab: int, tokens: int, dtype: str, way: str
) -> None:
    case = {"way": way, "vocab": vocab, "tokens": tokens, "dtype": dtype}
    try:
        with Worker(way, str(vocab), str(tokens), dtype) as worker:
            if (way, vocab, dtype) not in checks:
                checks[way, vocab, dtype] = worker.ask("check"), worker.ask("small_step")["seconds"]
            errors, seconds = checks[way, vocab, dtype]
            if any(not error < LARGEST_ERROR[dtype] for error in errors.values()):
                raise WorkerFailed(f"wrong: {errors}")
            worker.ask("prepare")
            peaks = []

            def step() -> None:
                peaks.append(worker.ask("step")["peak_mib"])

            seconds *= tokens / CHECKED_TOKENS  # about
            # The first step may compile, so that a second one has to say how long a step is.
            for _ in range(0 if seconds > WARM_UP_BELOW else 1 if seconds > SECONDS else 2):
                start = time.perf_counter()
                step()
                seconds = time.perf_counter() - start
            benchmark.pedantic(step, rounds=max(1, min(MOST_ROUNDS, int(SECONDS / seconds))))
        benchmark.extra_info.update(**case, **errors, peak_mib=max(peaks))
    except WorkerFailed as failure:
        failures.append({**case, "note": str(failure)})
        pytest.skip(str(failure))
