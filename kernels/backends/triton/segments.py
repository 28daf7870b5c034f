"""Sums over packed trajectories and their residuals: one program per trajectory, forward and backward in one launch each.

Sums are in float64 and in a fixed order, as those of `trajectory.py` are, which has the definition.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels' arguments have no types that mypy knows.
from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tile import kernel

BLOCK, WARPS = 1024, 4


@kernel
def residual_kernel(
    logprobs, lse, cu_seqlens, ref_logprob_sums, rewards, ref_values,  # [T], [T], [N + 1], [N] each; ref_values may be None
    out,  # [N]
    beta, BLOCK: tl.constexpr,
):  # fmt: skip
    """With `lse` None: the sums of logprobs alone."""
    i = tl.program_id(0)
    start, stop = tl.load(cu_seqlens + i), tl.load(cu_seqlens + i + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        t = first + tl.arange(0, BLOCK)
        total += tl.load(logprobs + t, mask=t < stop, other=0.0).to(tl.float64)
    result = tl.sum(total, 0).to(tl.float32)
    if lse is not None:
        result = result - tl.load(ref_logprob_sums + i)
        value = tl.load(lse + start, mask=start < stop, other=0.0)
        if ref_values is not None:
            value -= tl.load(ref_values + i)
        # An empty trajectory has no action to correct.
        result = tl.where(start < stop, value + result - tl.div_rn(tl.load(rewards + i), beta), 0.0)
    tl.store(out + i, result)


@kernel
def residual_grad_kernel(
    grad_out, cu_seqlens,  # [N], [N + 1]
    grad_logprobs, grad_lse,  # out: [T] each, grad_lse may be None
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    start, stop = tl.load(cu_seqlens + i), tl.load(cu_seqlens + i + 1)
    grad = tl.load(grad_out + i)
    for first in range(start, stop, BLOCK):
        t = first + tl.arange(0, BLOCK)
        of_each = tl.zeros([BLOCK], tl.float32) + grad
        tl.store(grad_logprobs + t, of_each, mask=t < stop)
        if grad_lse is not None:
            tl.store(grad_lse + t, tl.where(t == start, of_each, 0.0), mask=t < stop)


class Residual(torch.autograd.Function):
    """`trajectory_residual`, or with lse and all after cu_seqlens None `segment_sums`, of checked float32 arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        lse: Tensor | None,
        cu_seqlens: Tensor,
        ref_logprob_sums: Tensor | None = None,
        rewards: Tensor | None = None,
        ref_values: Tensor | None = None,
        beta: float = 1.0,
    ) -> Tensor:
        n_trajectories = len(cu_seqlens) - 1
        out = torch.empty(n_trajectories, dtype=torch.float32, device=logprobs.device)
        if n_trajectories > 0:
            inputs = (logprobs, lse, cu_seqlens, ref_logprob_sums, rewards, ref_values)
            contiguous = [None if x is None else x.contiguous() for x in inputs]
            residual_kernel[(n_trajectories,)](*contiguous, out, beta, BLOCK=BLOCK, num_warps=WARPS)
        ctx.save_for_backward(cu_seqlens.contiguous())
        ctx.n_tokens, ctx.with_lse = len(logprobs), lse is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        grad_logprobs = torch.empty(ctx.n_tokens, dtype=torch.float32, device=grad_out.device)
        grad_lse = torch.empty_like(grad_logprobs) if ctx.with_lse else None
        _gradients(grad_out, cu_seqlens, grad_logprobs, grad_lse)
        return grad_logprobs, grad_lse, None, None, None, None, None


def residual_gradients(grad_residual: Tensor, cu_seqlens: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """The derivatives by logprobs and lse [T], from those by the residuals [N]."""
    grad_logprobs, grad_lse = (
        torch.empty(n_tokens, dtype=torch.float32, device=grad_residual.device) for _ in range(2)
    )
    _gradients(grad_residual, cu_seqlens, grad_logprobs, grad_lse)
    return grad_logprobs, grad_lse


def _gradients(grad_residual: Tensor, cu_seqlens: Tensor, grad_logprobs: Tensor, grad_lse: Tensor | None) -> None:
    if len(grad_residual) > 0:
        residual_grad_kernel[(len(grad_residual),)](
            grad_residual.contiguous(), cu_seqlens.contiguous(), grad_logprobs, grad_lse, BLOCK=BLOCK, num_warps=WARPS
        )
