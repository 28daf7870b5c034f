"""Exponentials relative to the target's Q-value: exact for confident targets and unlikely ones, and computed again where they
would leave the range of a float. All else is tested with the other backends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tbrm_kernels import TokenStats, fused_linear_trajectory_loss, linear_token_stats
from tbrm_kernels.backends import registry
from tbrm_kernels.backends.interface import TokenStatsOptions
from tbrm_kernels.reference import token_stats_reference
from tests.kernels.heads import DEVICE, Head, random_head, rounding, seeded

if not registry.backends(DEVICE, torch.bfloat16)["triton"].usable:
    pytest.skip(registry.backends(DEVICE, torch.bfloat16)["triton"].reason, allow_module_level=True)

from tbrm_kernels.backends.triton import exps, launch

BOUNDS = [0, 1, 9, 13]


@pytest.fixture(autouse=True)
def triton_is_auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    chosen = {name: registry._BACKENDS[name] for name in ("triton", "torch")}
    monkeypatch.setattr(registry, "_BACKENDS", chosen)
    yield


def head_at(logprobs: Tensor, vocab: int = 150, width: int = 40) -> Head:
    """A head that gives each target about this log-prob: the other logits are of deviation 1, the target's is what it takes."""
    head = random_head(len(logprobs), vocab, width, torch.bfloat16, bias=False, ignored=0)
    weight = head.weight.float() / 3
    rows = weight[head.targets]
    hidden = head.hidden.float()
    others = (hidden @ weight.T).scatter(1, head.targets[:, None], -torch.inf).logsumexp(1)
    # log p = q - log(e^q + e^others)
    wanted = others + logprobs - torch.log1p(-logprobs.double().exp()).float()
    hidden += ((wanted - (hidden * rows).sum(1)) / rows.square().sum(1))[:, None] * rows
    return Head(hidden.bfloat16(), weight.bfloat16(), None, head.targets)


def loss_fn(stats: TokenStats, cu_seqlens: Tensor, first: int) -> Tensor:
    """With a first token whose softmax has no gradient, as TBRM has it, and others of either sign."""
    weights = torch.linspace(-2, 3, BOUNDS[-1], device=stats.logprobs.device)[: len(stats.logprobs)]
    loss = (weights * stats.logprobs).sum() + (stats.lse * weights)[:1].sum()
    return loss if stats.entropy is None else loss + (weights.flip(0) * stats.entropy).sum() / 4


def found_and_exact(head: Head, **options: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    leaves = [x.detach().clone().requires_grad_() for x in (head.hidden, head.weight)]
    loss, stats = fused_linear_trajectory_loss(*leaves, head.targets, bounds, loss_fn, max_chunk_bytes=10**9, **options)
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (head.hidden, head.weight)]
    true = TokenStats(*token_stats_reference(*exact, head.targets, **options))
    loss_fn(true, bounds, 0).backward()
    names = ("hidden", "weight")
    ours = {"logprobs": stats.logprobs, "lse": stats.lse} | {
        name: x.grad for name, x in zip(names, leaves, strict=True)
    }
    return ours, {"logprobs": true.logprobs, "lse": true.lse} | {
        name: x.grad for name, x in zip(names, exact, strict=True)
    }


def assert_exact(head: Head, **options: bool) -> None:
    ours, true = found_and_exact(head, **options)
    largest = true["logprobs"].abs().max().clamp(min=1)
    assert (ours["logprobs"] - true["logprobs"]).abs().max() <= 2e-6 * largest
    assert (ours["lse"] - true["lse"]).abs().max() <= 2e-6 * largest.clamp(min=true["lse"].abs().max())
    for name in ("hidden", "weight"):
        # Of each product two operands are rounded, each element by half of this at most.
        assert (ours[name] - true[name]).norm() <= 2 * rounding(head) * true[name].norm(), name


LEVELS = st.one_of(
    st.floats(-200, -1e-7), st.sampled_from([-1e-7, -1e-5, -1e-3, -0.7, -5.0, -59.0, -61.0, -69.0, -1e3])
)


@pytest.mark.parametrize("entropy", [False, True])
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(levels=st.lists(LEVELS, min_size=BOUNDS[-1], max_size=BOUNDS[-1]))
def test_any_confidence(levels: list[float], entropy: bool) -> None:
    assert_exact(head_at(torch.tensor(levels)), entropy=entropy)


def test_a_confident_token_keeps_the_digits_of_its_logprob() -> None:
    head = head_at(torch.full((BOUNDS[-1],), -1e-7))
    true = token_stats_reference(head.hidden.double(), head.weight.double(), head.targets)[0]
    assert true.min() > -1e-3  # what bfloat16 makes of it
    ours = linear_token_stats(head.hidden, head.weight, head.targets).logprobs
    torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loads", ["TMA", "pointers"])
@pytest.mark.parametrize(("tokens", "vocab", "width"), [(1, 1, 1), (1, 65, 7), (33, 64, 40), (70, 129, 65)])
def test_shapes(tokens: int, vocab: int, width: int, loads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if loads == "pointers" or DEVICE.type != "cuda":
        monkeypatch.setattr(exps, "has_tma", lambda device: loads == "TMA")
        monkeypatch.setattr(launch, "has_tma", lambda device: loads == "TMA")
    head = random_head(tokens, vocab, width, torch.bfloat16, bias=False, ignored=0)
    options = TokenStatsOptions(torch.bfloat16, entropy=True)
    operands = launch.Operands(head.hidden, head.weight, None, options)
    out = torch.empty(tokens, -(-vocab // 16) * 16, dtype=torch.bfloat16)[:, :vocab]
    found = exps.exps(operands, head.targets, options, out)
    logits = head.hidden.double() @ head.weight.double().T
    expected = (logits - logits.gather(1, head.targets[:, None])).exp()
    torch.testing.assert_close(out.double(), expected, rtol=2 * rounding(head) + 1e-4, atol=0)
    others = expected.scatter(1, head.targets[:, None], 0).sum(1)
    torch.testing.assert_close(found.others.double(), others, rtol=1e-5, atol=1e-30)
    logprobs, _, entropy = token_stats_reference(head.hidden.double(), head.weight.double(), head.targets, entropy=True)
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


def test_only_rows_that_do_not_fit_are_computed_again() -> None:
    levels = torch.full((70,), -3.0)
    levels[[3, 40]] = torch.tensor([-100.0, -61.0])
    head = head_at(levels)
    options = TokenStatsOptions(torch.bfloat16)
    operands = launch.Operands(head.hidden, head.weight, None, options)
    out = torch.empty(70, 160, dtype=torch.bfloat16)[:, :150]
    found = exps.exps(operands, head.targets, options, out)
    moved = found.shift != found.target_q
    assert moved.nonzero().flatten().tolist() == [3, 40]
    assert ((found.log_sum[moved] >= 0) & (found.log_sum[moved] <= math.log(150))).all()  # relative to the maximum
    assert out.isfinite().all()


def test_a_row_of_nan_stays_alone() -> None:
    head = head_at(torch.full((BOUNDS[-1],), -2.0))
    hidden = head.hidden.clone()
    hidden[5] = torch.nan
    logprobs, lse, _ = linear_token_stats(hidden, head.weight, head.targets)
    expected, _, _ = linear_token_stats(head.hidden, head.weight, head.targets)
    others = torch.arange(BOUNDS[-1]) != 5
    assert logprobs[5].isnan() and lse[5].isnan()
    torch.testing.assert_close(logprobs[others], expected[others])


def test_two_runs_are_bitwise_equal() -> None:
    head = head_at(torch.linspace(-90, -1e-3, BOUNDS[-1]))
    first, second = (found_and_exact(head, entropy=True)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the device is not waited for where it is the CPU")
def test_nothing_waits_for_the_device() -> None:
    head = head_at(torch.linspace(-90, -1e-3, BOUNDS[-1]))
    generator = seeded(0)
    weights = torch.randn(BOUNDS[-1], generator=generator)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    found_and_exact(head)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaves = [x.detach().clone().requires_grad_() for x in (head.hidden, head.weight)]
        (linear_token_stats(*leaves, head.targets).logprobs * weights).sum().backward()
        loss, _ = fused_linear_trajectory_loss(*leaves, head.targets, bounds, loss_fn)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
