"""The passes over a chunk's logits in the single pass: one program per token, which goes along its row.

The logits are float32. Their derivatives take their place, in the dtype of the products that come next: 16-bit values are
written over the front half of their own row, behind the place from which float32 ones are read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels' arguments have no types that mypy knows.
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..interface import RowGrads, RowStats, TokenStatsOptions
from .launch import Scaling
from .tile import LOWEST, derivative, exp, kernel, scale

BLOCK, WARPS = 4096, 8


@kernel
def row_stats_kernel(
    logits, bias, inverse_temperature, targets,  # [T, V] float32, [V] or None, [T] or None, [T]
    logprobs_out, max_out, log_sum_out, entropy_out,  # [T] each, entropy_out may be None
    V, ignore_index, inner, outer, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    row = logits + t.to(tl.int64) * V
    target = tl.load(targets + t)
    by = 1.0
    if inverse_temperature is not None:
        by = tl.load(inverse_temperature + t)
    logprob, maximum, log_sum, entropy = 0.0, 0.0, 0.0, 0.0
    if target != ignore_index:
        # One softmax per lane, all of them combined at the end of the row.
        m = tl.full([BLOCK], LOWEST, tl.float32)
        s = tl.zeros([BLOCK], tl.float32)
        u = tl.zeros([BLOCK], tl.float32)
        q_at_target = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(row + v, mask=v < V, other=0.0)
            if bias is not None:
                x += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)
            q = scale(x, inner, outer, CAPPED)
            if inverse_temperature is not None:
                q *= by
            q = tl.where(v < V, q, -float("inf"))
            q_at_target += tl.where(v == target, q, 0.0)
            m_new = tl.maximum(m, q)
            rescale, e = exp(m - m_new), exp(q - m_new)
            if entropy_out is not None:
                # e^-1e4 is 0: the bounds only keep infinities out of the products.
                u = (u - s * tl.maximum(m - m_new, -1e4)) * rescale - e * tl.maximum(q - m_new, -1e4)
            s = s * rescale + e
            m = m_new
        maximum = tl.max(m, 0)
        rescale = tl.exp(m - maximum)
        total = tl.sum(s * rescale, 0)
        log_sum = tl.log(total)
        logprob = (tl.sum(q_at_target, 0) - maximum) - log_sum
        if entropy_out is not None:
            entropy = log_sum + tl.sum((u - s * tl.maximum(m - maximum, -1e4)) * rescale, 0) / total
    tl.store(logprobs_out + t, logprob)
    tl.store(max_out + t, maximum)
    tl.store(log_sum_out + t, log_sum)
    if entropy_out is not None:
        tl.store(entropy_out + t, entropy)


@kernel
def row_dlogits_kernel(
    logits, out,  # [T, V] float32; the same memory as [T, V] of rows as far apart
    bias, inverse_temperature, targets,  # [V] or None, [T] or None, [T]
    maximum, log_sum, entropy,  # [T], [T], [T] or None
    grad_logprobs, grad_lse, grad_entropy,  # [T], [T], [T] or None
    V, out_stride, ignore_index, inner, outer, factor, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    row = logits + t.to(tl.int64) * V
    out_row = out + t.to(tl.int64) * out_stride
    lane = tl.arange(0, 1)
    target = tl.load(targets + t + lane)
    kept = target != ignore_index
    m, log_s = tl.load(maximum + t + lane), tl.load(log_sum + t + lane)
    g_logprobs, g_lse = tl.load(grad_logprobs + t + lane), tl.load(grad_lse + t + lane)
    if inverse_temperature is not None:
        by = tl.load(inverse_temperature + t + lane)
        factor = factor * by
    h, g_entropy = None, None
    if grad_entropy is not None:
        h, g_entropy = tl.load(entropy + t + lane), tl.load(grad_entropy + t + lane)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=0.0)
        if bias is not None:
            x += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)
        q = scale(x, inner, outer, CAPPED)[None, :]
        largest_q = outer
        if inverse_temperature is not None:
            q *= by[:, None]
            largest_q = outer * by[:, None]
        grad = derivative(
            q, target[:, None] == v[None, :], kept, m, log_s, h, g_logprobs, g_lse, g_entropy, factor, largest_q, CAPPED
        )
        tl.debug_barrier()  # all of the block is read before any of it is written over
        tl.store(out_row + v, tl.reshape(grad, [BLOCK]).to(out.dtype.element_ty), mask=v < V)


def row_stats(
    logits: Tensor,  # [T, V] float32
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T]
    options: TokenStatsOptions,
    scaling: Scaling,
) -> tuple[Tensor, RowStats]:
    """The log-probs [T] and the rest; 0 where the target is ignored."""
    n_rows, vocab = logits.shape

    def empty() -> Tensor:
        return torch.empty(n_rows, dtype=torch.float32, device=logits.device)

    logprobs, maximum, log_sum, entropy = empty(), empty(), empty(), empty() if options.entropy else None
    row_stats_kernel[(n_rows,)](
        logits,
        bias,
        scaling.inverse_temperature,
        targets,
        logprobs,
        maximum,
        log_sum,
        entropy,
        vocab,
        options.ignore_index,
        scaling.inner,
        scaling.outer,
        CAPPED=options.softcap is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return logprobs, RowStats(maximum, log_sum, entropy)


def row_dlogits_(
    logits: Tensor,  # [T, V] float32, overwritten
    bias: Tensor | None,
    targets: Tensor,
    options: TokenStatsOptions,
    scaling: Scaling,
    stats: RowStats,
    grads: RowGrads,
) -> Tensor:
    """dL/dlogits, [T, V] in the operands' dtype and in the memory of the logits; zeros where the target is ignored."""
    n_rows, vocab = logits.shape
    out = logits.view(options.operand_dtype)[:, :vocab]
    row_dlogits_kernel[(n_rows,)](
        logits,
        out,
        bias,
        scaling.inverse_temperature,
        targets,
        stats.max,
        stats.log_sum,
        stats.entropy,
        grads.logprobs,
        grads.lse,
        grads.entropy,
        vocab,
        out.stride(0),
        options.ignore_index,
        scaling.inner,
        scaling.outer,
        scaling.factor,
        CAPPED=options.softcap is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out
