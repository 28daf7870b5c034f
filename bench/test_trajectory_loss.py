"""Time of the TBRM loss, forward and backward, beside the three bare products that nobody can do without.

    make bench                                       # all of it, hours on two cores, and the table and plots
    make bench SHAPES="32768x1024"                   # vocabulary x tokens: DESIGN.md's one shape, minutes

Each way is checked against float64 before it is timed, at the same vocabulary and 64 tokens. Compare rows of one run
only: machines are noisy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.problem import Problem
from bench.shapes import DTYPES, shapes
from bench.ways import WAYS

CHECKED_TOKENS = 64
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of a gradient, relative, in the 2-norm

cases = pytest.mark.parametrize(
    ("vocab", "tokens", "dtype"),
    [pytest.param(v, t, d, id=f"V={v}-T={t}-{name}") for v, t in shapes() for name, d in DTYPES.items()],
)


@cases
def test_floor(benchmark: Any, vocab: int, tokens: int, dtype: torch.dtype) -> None:
    problem = Problem(vocab, tokens, dtype)
    gradient = torch.randn(tokens, vocab).to(dtype)

    @torch.no_grad()
    def three_products() -> None:
        problem.hidden @ problem.weight.T
        gradient @ problem.weight
        gradient.T @ problem.hidden

    benchmark.extra_info.update(way="floor", vocab=vocab, tokens=tokens, dtype=str(dtype))
    benchmark.pedantic(three_products, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("way", WAYS)
@cases
def test_loss_and_gradients(benchmark: Any, way: str, vocab: int, tokens: int, dtype: torch.dtype) -> None:
    benchmark.extra_info.update(way=way, vocab=vocab, tokens=tokens, dtype=str(dtype))
    benchmark.extra_info.update(check(way, vocab, dtype))
    problem = Problem(vocab, tokens, dtype)

    def step() -> None:
        problem.hidden.grad = problem.weight.grad = None
        WAYS[way](problem).backward()

    benchmark.pedantic(step, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("way", ["linear_token_stats", "one product"])
@cases
def test_scoring(benchmark: Any, way: str, vocab: int, tokens: int, dtype: torch.dtype) -> None:
    """The forward pass alone, without gradient."""
    from tbrm_kernels import linear_token_stats

    problem = Problem(vocab, tokens, dtype)

    @torch.no_grad()
    def score() -> None:
        if way == "one product":
            problem.hidden @ problem.weight.T
        else:
            linear_token_stats(problem.hidden, problem.weight, problem.targets)

    benchmark.extra_info.update(way=f"scoring: {way}", vocab=vocab, tokens=tokens, dtype=str(dtype))
    benchmark.pedantic(score, rounds=7, warmup_rounds=1)


def check(way: str, vocab: int, dtype: torch.dtype) -> dict[str, float]:
    """The relative errors of both gradients; skips the way if it cannot run here."""
    problem = Problem(vocab, CHECKED_TOKENS, dtype)
    try:
        WAYS[way](problem).backward()
    except ImportError as error:
        pytest.skip(f"{way}: {error}")
    errors = {}
    for name, ours, exact in zip(
        ("hidden", "weight"), problem.take_gradients(), problem.exact_gradients(), strict=True
    ):
        errors[f"error_{name}"] = float((ours - exact).norm() / exact.norm())
    assert max(errors.values()) < LARGEST_ERROR[dtype], errors
    return errors
