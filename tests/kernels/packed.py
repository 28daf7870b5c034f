"""Heads over packed trajectories: the single pass, and its definition in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_kernels import TokenStats, fused_linear_tbrm_loss, fused_linear_trajectory_loss
from tbrm_kernels.backends import registry
from tbrm_kernels.reference import token_stats_reference, trajectory_residual_reference
from tests.kernels.heads import DEVICE, Head, luck, multiplies_bfloat16, plain_bfloat16, rounding, seeded

BETA = 0.5
LENGTHS = [5, 0, 1, 9, 3, 0]
"""Trajectories of length 0 (the last among them) and 1, and one that is longer than the others together."""
CHUNKS = [
    pytest.param(None, id="as shipped"),
    pytest.param(6, id="one trajectory does not fit"),
    pytest.param(1, id="none fits"),
    pytest.param(18, id="all fit"),
]


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)


def chunk_bytes(tokens: int | None, head: Head) -> int | None:
    """The bytes in which so many tokens fit."""
    if tokens is None:
        return None
    backend = registry.select("auto", DEVICE, head.hidden.dtype)
    itemsize = 8 if head.hidden.dtype == torch.float64 else 4
    if backend is not registry._BACKENDS["torch"] and multiplies_bfloat16(head):
        itemsize = 2
    return tokens * len(head.weight) * itemsize


def keeps_exps(head: Head) -> bool:
    return "triton" in registry._BACKENDS and head.hidden.dtype == torch.bfloat16


def scores(lengths: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = seeded(2)
    names = ("ref_logprob_sums", "rewards", "ref_values")
    return {name: torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(dtype) for name in names}


def leaves_of(head: Head) -> dict[str, Tensor]:
    named = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    return {name: leaf.detach().requires_grad_() for name, leaf in named.items() if leaf is not None}


def definition(
    head: Head, lengths: list[int], stats_of: Callable[..., Any] = token_stats_reference, **options: Any
) -> dict[str, Tensor]:
    """Loss, residuals and gradients by the definition, through the statistics that `stats_of` gives."""
    leaves = leaves_of(head)
    logprobs, lse, _ = stats_of(targets=head.targets, **leaves, **options)
    residuals = trajectory_residual_reference(
        logprobs, lse, bounds(lengths), beta=BETA, **scores(lengths, logprobs.dtype)
    )
    loss = residuals.square().sum() / max(1, len(lengths))
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    else:  # there is no action
        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves.values())
    results = {"loss": loss.detach(), "residuals": residuals.detach()}
    return results | {f"d_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def single_pass(head: Head, lengths: list[int], tokens: int | None = None, **options: Any) -> dict[str, Tensor]:
    leaves = leaves_of(head)
    dtype = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
    out = fused_linear_tbrm_loss(
        targets=head.targets,
        cu_seqlens=bounds(lengths),
        beta=BETA,
        max_chunk_bytes=chunk_bytes(tokens, head),
        **scores(lengths, dtype),
        **leaves,
        **options,
    )
    out.loss.backward()
    results = {"loss": out.loss.detach(), "residuals": out.residuals}
    return results | {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_as_good_as_plain_torch(head: Head, lengths: list[int], tokens: int | None = None, **options: Any) -> None:
    truth = definition(head.double(), lengths, **options)
    plain = definition(head, lengths, **options)
    if multiplies_bfloat16(head):
        rounded = definition(head, lengths, plain_bfloat16, **options)
        plain |= {name: value for name, value in rounded.items() if name.startswith("d_")}
    ours = single_pass(head, lengths, tokens, **options)
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        if true.numel() == 0:
            continue
        eps = 1e-13 if head.hidden.dtype == torch.float64 else torch.finfo(torch.float32).eps
        if name.startswith("d_"):
            eps += rounding(head) / 64
        allowed = luck(head) * (plain[name] - true).abs().max() + 64 * eps * true.abs().max().clamp(min=1)
        assert ours[name].dtype == plain[name].dtype
        assert (ours[name] - true).abs().max() <= allowed, name


def per_token(stats: TokenStats, cu_seqlens: Tensor, first: int) -> Tensor:
    """A loss that uses every output, with a weight of its own for every trajectory and token."""
    assert stats.entropy is not None
    trajectory = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff()) + first
    place = torch.arange(len(stats.lse)) - cu_seqlens[trajectory - first]
    weight = (trajectory + 1) * torch.cos(place.to(stats.lse.dtype))
    return (weight * stats.logprobs + stats.lse.square() * weight.sin() - stats.entropy * weight).sum()


def gradients_of(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def simple_loss(leaves: dict[str, Tensor], head: Head, **options: Any) -> Tensor:
    return fused_linear_trajectory_loss(
        targets=head.targets, cu_seqlens=bounds(LENGTHS), loss_fn=per_token, entropy=True, **leaves, **options
    )[0]


def assert_near(ours: Tensor | None, wanted: Tensor | None) -> None:
    assert ours is not None and wanted is not None
    assert (ours - wanted).norm() <= 1e-5 * wanted.norm()
