"""dL/dlogits of a slice of the vocabulary, from logits that are computed again."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels' arguments have no types that mypy knows.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..interface import RowGrads, RowStats, TokenStatsOptions
from .launch import Operands, TileConfig
from .tile import derivative, kernel, per_token, q_tile


@kernel
def dlogits_kernel(
    hidden, weight, bias, inverse_temperature, targets,  # [T, D], [V, D], [V] or None, [T] or None, [T]
    maximum, log_sum, entropy,  # [T], [T], [T] or None
    grad_logprobs, grad_lse, grad_entropy,  # [T], [T], [T] or None
    out,  # [T, width], its columns those of the weight's rows from first_v on
    T, V, D, stride_hidden, stride_weight, first_v, width, inner, outer, factor, ignore_index,
    CAPPED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(T, BLOCK_T)
    t0 = tl.program_id(0) % row_tiles * BLOCK_T
    column = tl.program_id(0) // row_tiles * BLOCK_V
    v0 = first_v + column

    row, lane = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V)
    t = t0 + row
    inside = t < T
    target = tl.load(targets + t, mask=inside, other=ignore_index)
    # 64 bits for the tile's place alone: one pointer per element would take half of the registers.
    tile = out + tl.cast(t0, tl.int64) * width + column
    q = q_tile(
        hidden, weight, bias, inverse_temperature, t0, v0, T, V, D, stride_hidden, stride_weight, inner, outer,
        CAPPED, FACTOR, BLOCK_T, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    factor = per_token(factor, inverse_temperature, t, T)
    if inverse_temperature is not None:
        outer = per_token(outer, inverse_temperature, t, T)[:, None]
    h, g_entropy = None, None
    if grad_entropy is not None:
        h = tl.load(entropy + t, mask=inside, other=0.0)
        g_entropy = tl.load(grad_entropy + t, mask=inside, other=0.0)
    grad = derivative(
        q, (target - v0)[:, None] == lane[None, :], target != ignore_index,
        tl.load(maximum + t, mask=inside, other=0.0), tl.load(log_sum + t, mask=inside, other=0.0), h,
        tl.load(grad_logprobs + t, mask=inside, other=0.0), tl.load(grad_lse + t, mask=inside, other=0.0), g_entropy,
        factor, outer, CAPPED,
    )  # fmt: skip
    mask = inside[:, None] & (lane < width - column)[None, :]
    tl.store(tile + row[:, None] * width + lane[None, :], grad.to(out.dtype.element_ty), mask=mask)


def dlogits(
    operands: Operands,
    targets: Tensor,
    options: TokenStatsOptions,
    stats: RowStats,
    grads: RowGrads,
    vocabulary: slice,  # starts at a multiple of the configuration's block_v
    out: Tensor,  # [T, vocabulary entries]
    config: TileConfig,
) -> None:
    """Writes dL/dlogits of the slice to `out`, zeros in the rows whose target is ignored."""
    T = len(operands.hidden)
    width = vocabulary.stop - vocabulary.start
    arguments = operands.arguments(config)
    dlogits_kernel[(triton.cdiv(T, config.block_t) * triton.cdiv(width, config.block_v),)](
        *arguments.tensors,
        targets,
        stats.max,
        stats.log_sum,
        stats.entropy,
        grads.logprobs,
        grads.lse,
        grads.entropy,
        out,
        *arguments.sizes,
        vocabulary.start,
        width,
        *operands.scaling[:3],
        options.ignore_index,
        **arguments.constants,
    )
