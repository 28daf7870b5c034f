"""Time of the TBRM loss's head, forward and backward, beside the three bare products that nobody can do without.

    make bench

T = 1024 tokens in 4 trajectories, D = 896, V = 32768, float32 (the shape of shared/DESIGN.md, section 4). `eager` holds all
logits. Each way is checked against the float64 definition before it is timed. Compare the rows of one run only: machines
are noisy.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tbrm_kernels import linear_token_stats, segment_sums, trajectory_residual
from tbrm_kernels.reference import token_stats_reference

T, D, V, N = 1024, 896, 32768, 4
BETA = 0.002


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / D**0.5).requires_grad_()
    return hidden, weight, torch.randint(V, (T,), generator=generator)


def loss_through(
    stats_of: Callable[..., tuple[Tensor, ...]], hidden: Tensor, weight: Tensor, targets: Tensor
) -> Tensor:
    logprobs, lse = stats_of(hidden, weight, targets)[:2]
    cu_seqlens = torch.arange(0, T + 1, T // N, dtype=torch.int32)
    ref_sums = segment_sums(logprobs.detach(), cu_seqlens)
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=logprobs.dtype)
    return trajectory_residual(logprobs, lse, cu_seqlens, ref_sums, rewards, BETA).square().mean()


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    lse = logits.logsumexp(-1)
    return logits.gather(1, targets[:, None])[:, 0] - lse, lse


@pytest.mark.parametrize("way", [linear_token_stats, eager], ids=["linear_token_stats", "eager"])
def test_loss_and_gradients(benchmark, way) -> None:
    hidden, weight, targets = inputs()

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        loss = loss_through(way, hidden, weight, targets)
        loss.backward()
        return loss

    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss_through(token_stats_reference, exact_hidden, exact_weight, targets).backward()
    step()
    for ours, exact in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert (ours - exact).norm() < 1e-5 * exact.norm()
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def test_floor_three_products(benchmark) -> None:
    hidden, weight, _ = (x.detach() for x in inputs())
    gradient = torch.randn(T, V)

    def products() -> None:
        hidden @ weight.T
        gradient @ weight
        gradient.T @ hidden

    benchmark.pedantic(products, rounds=5, warmup_rounds=1)
