"""Exponentials of the Q-values relative to a number that is known before the product, so that no pass over the logits is left.

A softmax is usually taken relative to its row's maximum, which nobody knows before all of the row is computed. Any number near
its log-sum-exp does as well, since bfloat16 has the exponents of float32; the Q-value of the target is one, and costs a dot
product. So, with c that number, q the target's Q-value and a the target,

    E_v = e^(Q_v - c)       written once, in bfloat16, while the tile of Q is in registers; or not at all, to score
    S'  = sum of E_v, v != a       in float32, from E before it is rounded; parts per tile, added up in a fixed order
    log pi = -log1p(S' / e^(q - c))       lse = c + log(S' + e^(q - c))

Where the sum is above e^60, since the policy gives the target less than e^-60, c is no good: such rows are computed again,
relative to their maximum, which is found on the way. The device decides; nobody waits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels' arguments have no types that mypy knows.
from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..head_memory import ALIGNMENT
from ..interface import RowStats, TokenStatsOptions
from .launch import Operands, TileConfig, exp_config, has_tma, multiprocessors
from .tile import LOWEST, exp, kernel, per_token, q_tile, scale, slope

LARGEST = tl.constexpr(1.1420073898156842e26)  # e^60
SUMS_ROWS, SUMS_TILES, SUMS_WARPS = 32, 64, 4
ROW_BLOCK, ROW_WARPS = 1024, 4
GROUP_BYTES = 2**24
"""Of the hidden states whose tiles are computed together: a third of an H100's second-level cache."""


@kernel
def target_kernel(
    hidden, weight, bias, inverse_temperature, targets,  # [T, D], [V, D], [V] or None, [T] or None, [T]
    target_q, shift,  # out: [T] each
    D, stride_hidden, stride_weight, ignore_index, inner, outer, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The Q-value of each target, and as the shift the same where it is finite; 0 where the target is ignored."""
    t = tl.program_id(0)
    target = tl.load(targets + t)
    q = 0.0
    if target != ignore_index:
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            h = tl.load(hidden + t.to(tl.int64) * stride_hidden + d, mask=d < D, other=0.0)
            w = tl.load(weight + target * stride_weight + d, mask=d < D, other=0.0)
            products += h.to(tl.float32) * w.to(tl.float32)
        x = tl.sum(products, 0)
        if bias is not None:
            x += tl.load(bias + target).to(tl.float32)
        q = scale(x, inner, outer, CAPPED)
        if inverse_temperature is not None:
            q *= tl.load(inverse_temperature + t)
    tl.store(target_q + t, q)
    tl.store(shift + t, tl.where(tl.abs(q) < float("inf"), q, 0.0))


@triton.jit
def exp_tile(
    hidden, weight, bias, inverse_temperature, targets, shift, out, sums, largest, weighted,
    t0, tile, T, V, D, stride_hidden, stride_weight, stride_out, inner, outer,
    CAPPED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """E of one tile, and its part of the sums."""
    v0 = tile * BLOCK_V
    q = q_tile(
        hidden, weight, bias, inverse_temperature, t0, v0, T, V, D, stride_hidden, stride_weight, inner, outer,
        CAPPED, FACTOR, BLOCK_T, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    row, lane = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V)
    t = t0 + row
    inside = t < T
    c = tl.load(shift + t, mask=inside, other=0.0)
    at = tl.cast(tile, tl.int64) * T + t
    tl.store(largest + at, tl.max(q, 1) - c, mask=inside)
    x = q - c[:, None]
    e = exp(x)
    target = tl.load(targets + t, mask=inside, other=-1)
    others = tl.where((target - v0).to(tl.int32)[:, None] == lane[None, :], 0.0, e)  # no vocabulary has 2^31 entries
    tl.store(sums + at, tl.sum(others, 1), mask=inside)
    if weighted is not None:
        # e^-1e4 is 0: the bound only keeps infinities out of the product.
        tl.store(weighted + at, tl.sum(others * tl.maximum(x, -1e4), 1), mask=inside)
    if out is not None:
        if CAPPED:
            largest_q = per_token(outer, inverse_temperature, t, T)
            if inverse_temperature is not None:
                largest_q = largest_q[:, None]
            e *= slope(q, largest_q)
        if isinstance(out, tl.tensor_descriptor):
            out.store([t0, v0], e.to(out.dtype))
        else:
            mask = inside[:, None] & (lane < V - v0)[None, :]
            corner = out + tl.cast(t0, tl.int64) * stride_out + v0
            tl.store(corner + row[:, None] * stride_out + lane[None, :], e.to(out.dtype.element_ty), mask=mask)


@kernel
def exp_kernel(
    hidden, weight, bias, inverse_temperature, targets, shift,  # [T, D], [V, D], [V] or None, [T] or None, [T], [T]
    out,  # [T, V], or None
    sums, largest, weighted,  # out: [tiles, T] each: of E, the largest Q - shift, of E (Q - shift); weighted may be None
    T, V, D, stride_hidden, stride_weight, stride_out, group, inner, outer,
    CAPPED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """Each program takes tile after tile, those of `group` row tiles together: their hidden states stay in the cache."""
    row_tiles, tiles = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
    for number in tl.range(tl.program_id(0), row_tiles * tiles, tl.num_programs(0), flatten=FLATTEN):
        first = number // (group * tiles) * group
        rows = min(row_tiles - first, group)
        within = number - first * tiles
        exp_tile(
            hidden, weight, bias, inverse_temperature, targets, shift, out, sums, largest, weighted,
            (first + within % rows) * BLOCK_T, within // rows,
            T, V, D, stride_hidden, stride_weight, stride_out, inner, outer,
            CAPPED, FACTOR, BLOCK_T, BLOCK_V, BLOCK_D,
        )  # fmt: skip


@kernel
def exp_again_kernel(
    hidden, weight, bias, inverse_temperature, targets, shift, unfit,  # as above; [T] int8: rows that are computed again
    out, sums, largest, weighted,
    T, V, D, stride_hidden, stride_weight, stride_out, splits, inner, outer,
    CAPPED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows around those that are `unfit` too: they come out as they were."""
    row_tiles, tiles = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
    t0 = tl.program_id(0) % row_tiles * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    wanted = tl.max(tl.load(unfit + t, mask=t < T, other=0).to(tl.int32), 0)
    for tile in range(tl.program_id(0) // row_tiles, tiles * wanted, splits):
        exp_tile(
            hidden, weight, bias, inverse_temperature, targets, shift, out, sums, largest, weighted,
            t0, tile, T, V, D, stride_hidden, stride_weight, stride_out, inner, outer,
            CAPPED, FACTOR, BLOCK_T, BLOCK_V, BLOCK_D,
        )  # fmt: skip


@kernel
def sums_kernel(
    sums, largest, weighted,  # [tiles, T] each, weighted may be None
    target_q, shift, targets,  # [T] each
    logprobs_out, others_out, log_sum_out, entropy_out, shift_out, unfit_out,  # [T] each, entropy_out may be None
    T, tiles, ignore_index, BLOCK_T: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < T
    s = tl.zeros([BLOCK_TILES, BLOCK_T], tl.float32)
    u = tl.zeros([BLOCK_TILES, BLOCK_T], tl.float32)
    m = tl.full([BLOCK_TILES, BLOCK_T], LOWEST, tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        at = tile[:, None].to(tl.int64) * T + t[None, :]
        mask = (tile < tiles)[:, None] & inside[None, :]
        s += tl.load(sums + at, mask=mask, other=0.0)
        m = tl.maximum(m, tl.load(largest + at, mask=mask, other=LOWEST))
        if weighted is not None:
            u += tl.load(weighted + at, mask=mask, other=0.0)
    others = tl.sum(s, 0)
    kept = inside & (tl.load(targets + t, mask=inside, other=ignore_index) != ignore_index)
    c = tl.load(shift + t, mask=inside, other=0.0)
    x = tl.load(target_q + t, mask=inside, other=0.0) - c
    own = tl.exp(x)
    total = others + own
    log_sum = tl.log(total)
    ratio = others / own
    # log1p of a small number keeps what a confident token's logprob consists of.
    logprob = tl.where(ratio < 0.5, -log1p(ratio), x - log_sum)
    fits = (total < LARGEST) & (total > 1 / LARGEST)  # written so that a NaN does not fit
    unfit = kept & (fits == 0)
    tl.store(unfit_out + t, unfit.to(tl.int8), mask=inside)
    tl.store(shift_out + t, tl.where(unfit, c + tl.max(m, 0), c), mask=inside)
    tl.store(logprobs_out + t, tl.where(kept, logprob, 0.0), mask=inside)
    tl.store(others_out + t, others, mask=inside)
    tl.store(log_sum_out + t, tl.where(kept, log_sum, 0.0), mask=inside)
    if entropy_out is not None:
        mean = (tl.sum(u, 0) + own * tl.maximum(x, -1e4)) / total
        tl.store(entropy_out + t, tl.where(kept, log_sum - mean, 0.0), mask=inside)


@triton.jit
def log1p(x):
    """Of 0 <= x <= 1/2: log(1 + x) to the last bits, by the correction of what 1 + x rounds away."""
    y = 1.0 + x
    return tl.log(y) + (x - (y - 1.0)) / y


class Exps(NamedTuple):
    """What is known of T tokens, [T] float32 each but `values`."""

    values: Tensor | None
    """[T, V] bfloat16: E, times the slope of the soft-cap; anything in rows whose target is ignored."""
    target_q: Tensor
    shift: Tensor
    others: Tensor  # S'
    logprobs: Tensor
    log_sum: Tensor  # log(S' + e^(target_q - shift))
    entropy: Tensor | None

    @property
    def stats(self) -> RowStats:
        return RowStats(self.shift, self.log_sum, self.entropy)


def exps(operands: Operands, targets: Tensor, options: TokenStatsOptions, out: Tensor | None) -> Exps:
    """Of T > 0 tokens. The exponentials go to `out`, if given: [T, V] bfloat16, its rows a multiple of 16 bytes apart."""
    T, V = len(targets), len(operands.weight)
    config = exp_config(operands, keep=out is not None)
    again = replace(config, block_t=config.block_t // 2)  # which leaves it registers
    row_tiles, tiles = triton.cdiv(T, config.block_t), triton.cdiv(V, config.block_v)
    pitch = 0 if out is None else out.stride(0)
    sums, largest, *rest = _vectors(targets, 2 + options.entropy, tiles, T)
    parts = (sums, largest, rest[0] if rest else None)

    target_q, shift = _target_q(operands, targets, options)
    programs = multiprocessors(targets.device)
    arguments = operands.arguments(config)
    group = max(1, GROUP_BYTES // (config.block_t * operands.hidden.stride(0) * operands.hidden.element_size()))
    exp_kernel[(min(programs, row_tiles * tiles),)](
        *arguments.tensors, targets, shift, _blocks(out, config), *parts, *arguments.sizes, pitch, group, *operands.scaling[:2],
        FLATTEN=config.flatten, **arguments.constants,
    )  # fmt: skip
    found, unfit = _add_up(parts, out, target_q, shift, targets, options)

    # The device alone knows whether a row does not fit: where none does, this finds nothing to do.
    row_tiles = triton.cdiv(T, again.block_t)
    splits = min(tiles, triton.cdiv(4 * programs, row_tiles))
    arguments = operands.arguments(again)
    exp_again_kernel[(row_tiles * splits,)](
        *arguments.tensors, targets, found.shift, unfit, _blocks(out, again), *parts, *arguments.sizes, pitch, splits,
        *operands.scaling[:2], **arguments.constants,
    )  # fmt: skip
    return _add_up(parts, out, target_q, found.shift, targets, options)[0]


def _blocks(out: Tensor | None, config: TileConfig) -> Any:
    """`out` as the kernels write it: by a descriptor where there is a unit (TMA) that stores blocks."""
    if out is None or not has_tma(out.device):
        return out
    return TensorDescriptor(out, list(out.shape), list(out.stride()), [config.block_t, config.block_v])


def _target_q(operands: Operands, targets: Tensor, options: TokenStatsOptions) -> tuple[Tensor, Tensor]:
    hidden, weight, scaling = operands.hidden, operands.weight, operands.scaling
    target_q, shift = _vectors(targets, 2, len(targets))
    target_kernel[(len(targets),)](
        hidden, weight, operands.bias, scaling.inverse_temperature, targets, target_q, shift,
        hidden.shape[1], hidden.stride(0), weight.stride(0), options.ignore_index, scaling.inner, scaling.outer,
        CAPPED=options.softcap is not None, BLOCK=ROW_BLOCK, num_warps=ROW_WARPS,
    )  # fmt: skip
    return target_q, shift


def _add_up(
    parts: tuple[Tensor, Tensor, Tensor | None],
    values: Tensor | None,
    target_q: Tensor,
    shift: Tensor,
    targets: Tensor,
    options: TokenStatsOptions,
) -> tuple[Exps, Tensor]:
    """The sums over tiles and what follows from them, and which rows [T] do not fit: their shift is a new one."""
    tiles, T = parts[0].shape
    logprobs, others, log_sum, better, *rest = _vectors(targets, 4 + options.entropy, T)
    entropy = rest[0] if rest else None
    unfit = torch.empty(T, dtype=torch.int8, device=shift.device)
    sums_kernel[(triton.cdiv(T, SUMS_ROWS),)](
        *parts, target_q, shift, targets, logprobs, others, log_sum, entropy, better, unfit, T, tiles,
        options.ignore_index, BLOCK_T=SUMS_ROWS, BLOCK_TILES=SUMS_TILES, num_warps=SUMS_WARPS,
    )  # fmt: skip
    return Exps(values, target_q, better, others, logprobs, log_sum, entropy), unfit


def _vectors(like: Tensor, number: int, *shape: int) -> list[Tensor]:
    """So many float32 tensors of the shape, in one allocation but each at a round address."""
    size = math.prod(shape)
    memory = torch.empty(number, triton.cdiv(size, ALIGNMENT) * ALIGNMENT, dtype=torch.float32, device=like.device)
    return [part[:size].view(shape) for part in memory.unbind()]
