"""Time and peak memory of the TBRM loss, forward and backward, beside the three bare products that nobody can do without.

    make bench                                       # all of it, over an hour on two cores, and the table and plots
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
WARM_UP_BELOW = 40  # expected seconds of a step; a longer one is warmed up at CHECKED_TOKENS alone, and taken once

Errors = dict[tuple[str, int, str], dict[str, float]]


@pytest.fixture(scope="session")
def errors() -> Errors:
    """Of each way, vocabulary and dtype: found once for all numbers of tokens."""
    return {}


@pytest.mark.parametrize("way", [FLOOR, *WAYS, ONE_PRODUCT, SCORING])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "tokens"), shapes())
def test_loss_and_gradients(
    benchmark: Any, failures: list[dict[str, Any]], errors: Errors, vocab: int, tokens: int, dtype: str, way: str
) -> None:
    case = {"way": way, "vocab": vocab, "tokens": tokens, "dtype": dtype}
    try:
        with Worker(way, str(vocab), str(tokens), dtype) as worker:
            if (way, vocab, dtype) not in errors:
                errors[way, vocab, dtype] = worker.ask("check")
            checked = errors[way, vocab, dtype]
            if any(not error < LARGEST_ERROR[dtype] for error in checked.values()):
                raise WorkerFailed(f"wrong: {checked}")
            # Too much for some ways, since a small step, too, makes all of the weight's gradient.
            expected = worker.ask("warm_up")["seconds"] * tokens / CHECKED_TOKENS
            worker.ask("prepare")
            peaks, rounds = [], 1
            if expected < WARM_UP_BELOW:
                start = time.perf_counter()
                peaks.append(worker.ask("step")["peak_mib"])
                rounds = max(1, min(MOST_ROUNDS, int(SECONDS / (time.perf_counter() - start))))
            benchmark.pedantic(lambda: peaks.append(worker.ask("step")["peak_mib"]), rounds=rounds)
        benchmark.extra_info.update(**case, **checked, peak_mib=max(peaks))
    except WorkerFailed as failure:
        failures.append({**case, "note": str(failure)})
        pytest.skip(str(failure))
