"""dL/dlogits of a slice of the vocabulary, from logits that are computed again.

Where `tile_lse` was kept, tiles that cannot matter are not computed: see `filter_gradients` of `linear_token_stats`. The
idea is that of gradient filtering in "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009); the criterion
here bounds the sum of what a row may lose.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels' arguments have no types that mypy knows.
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import RowGrads, RowStats, TokenStatsOptions
from .launch import Operands, TileConfig
from .tile import derivative, q_tile


@triton.jit
def dlogits_kernel(
    hidden, weight, bias, targets,  # [T, D], [V, D], [V] or None, [T]
    maximum, log_sum, entropy, tile_matters,  # [T], [T], [T] or None, [tiles of the slice, row tiles] or None
    grad_logprobs, grad_lse, grad_entropy,  # [T], [T], [T] or None
    out,  # [T, width], its columns those of the weight's rows from first_v on
    T, V, D, stride_hidden, stride_weight, first_v, width, inner, outer, factor, ignore_index,
    CAPPED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(T, BLOCK_T)  # programs are numbered as tile_matters is
    t0 = tl.program_id(0) % row_tiles * BLOCK_T
    column = tl.program_id(0) // row_tiles * BLOCK_V
    v0 = first_v + column

    row, lane = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V)
    t = t0 + row
    inside = t < T
    target = tl.load(targets + t, mask=inside, other=ignore_index)
    # 64 bits for the tile's place alone: one pointer per element would take half of the registers.
    tile = out + tl.cast(t0, tl.int64) * width + column
    width_of_product = D
    if tile_matters is not None:
        # Where it is 0, the product has no terms. A return from here would cost registers.
        matters = tl.load(tile_matters + tl.program_id(0))
        width_of_product = D * matters
    q = q_tile(
        hidden, weight, bias, t0, v0, T, V, width_of_product, stride_hidden, stride_weight, inner, outer,
        CAPPED, FACTOR, BLOCK_T, BLOCK_V, BLOCK_D,
    )  # fmt: skip
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
    if tile_matters is not None:
        grad = tl.where(matters != 0, grad, 0.0)
    mask = inside[:, None] & (lane < width - column)[None, :]
    tl.store(tile + row[:, None] * width + lane[None, :], grad.to(out.dtype.element_ty), mask=mask)


def tiles_that_matter(
    stats: RowStats, targets: Tensor, ignore_index: int, vocabulary: slice, negligible: float, config: TileConfig
) -> Tensor:
    """[tiles of the slice, row tiles] int8: 1 where a row has its target, or more than e^negligible of its probability."""
    assert stats.tile_lse is not None
    first, last = vocabulary.start // config.block_v, triton.cdiv(vocabulary.stop, config.block_v)
    tiles = torch.arange(first, last, device=targets.device)[:, None]
    share = stats.tile_lse[first:last] - (stats.max + stats.log_sum)
    matters = ~(share < negligible) | (targets // config.block_v == tiles)  # written so that a NaN matters
    matters &= targets != ignore_index
    rows = triton.cdiv(len(targets), config.block_t) * config.block_t
    padded = torch.nn.functional.pad(matters, (0, rows - len(targets)))
    return padded.view(last - first, -1, config.block_t).any(-1).to(torch.int8)


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
    T, V = len(operands.hidden), len(operands.weight)
    width = vocabulary.stop - vocabulary.start
    matters = None
    if stats.tile_lse is not None and grads.entropy is None:
        rounding = torch.finfo(operands.hidden.dtype).eps / 2
        # All negligible tiles together hold less of a row's probability than the rounding of the gradient's dtype.
        negligible = math.log(rounding * config.block_v / V)
        matters = tiles_that_matter(stats, targets, options.ignore_index, vocabulary, negligible, config)
    arguments = operands.arguments(config)
    dlogits_kernel[(triton.cdiv(T, config.block_t) * triton.cdiv(width, config.block_v),)](
        *arguments.tensors,
        targets,
        stats.max,
        stats.log_sum,
        stats.entropy,
        matters,
        grads.logprobs,
        grads.lse,
        grads.entropy,
        out,
        *arguments.sizes,
        vocabulary.start,
        width,
        *operands.scaling,
        options.logit_scale / options.temperature,
        options.ignore_index,
        **arguments.constants,
    )
