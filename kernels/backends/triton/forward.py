"""The statistics of each token, with no logit in memory: a product in tiles, and an online softmax over them.

The vocabulary is split across programs; each leaves its part of every statistic, and `combine_kernel` adds the parts up in
a fixed order: no atomics, and the same result every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels' arguments have no types that mypy knows.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import RowStats, TokenStatsOptions
from .launch import Operands, TileConfig, program_count
from .tile import LOWEST, exp, kernel, q_tile

COMBINE_BLOCK, COMBINE_WARPS = 128, 4


@kernel
def forward_kernel(
    hidden, weight, bias, inverse_temperature, targets,  # [T, D], [V, D], [V] or None, [T] or None, [T]
    maximum, total, weighted, target_q,  # out: [splits, T] each; weighted may be None
    T, V, D, stride_hidden, stride_weight, splits, inner, outer,
    CAPPED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time read the same part of the weight, for different tokens.
    row_tiles = tl.cdiv(T, BLOCK_T)
    t0 = tl.program_id(0) % row_tiles * BLOCK_T
    split = tl.program_id(0) // row_tiles
    tiles = tl.cdiv(V, BLOCK_V)
    tiles_per_split = tl.cdiv(tiles, splits)

    t = t0 + tl.arange(0, BLOCK_T)
    inside = t < T
    target = tl.load(targets + t, mask=inside, other=-1)
    m = tl.full([BLOCK_T], LOWEST, tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)  # sum of e^(q - m)
    u = tl.zeros([BLOCK_T], tl.float32)  # sum of e^(q - m) (m - q)
    q_at_target = tl.zeros([BLOCK_T], tl.float32)
    for tile in range(split * tiles_per_split, min(tiles, (split + 1) * tiles_per_split)):
        q = q_tile(
            hidden, weight, bias, inverse_temperature, t0, tile * BLOCK_V, T, V, D, stride_hidden, stride_weight, inner, outer,
            CAPPED, FACTOR, BLOCK_T, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        q_at_target += tl.sum(tl.where(target[:, None] == v[None, :], q, 0.0), 1)

        m_new = tl.maximum(m, tl.max(q, 1))
        x = q - m_new[:, None]
        e = exp(x)
        tile_sum = tl.sum(e, 1)
        rescale = tl.exp(m - m_new)
        if weighted is not None:
            # e^-1e4 is 0: the bounds only keep infinities out of the products.
            u = (u - s * tl.maximum(m - m_new, -1e4)) * rescale - tl.sum(e * tl.maximum(x, -1e4), 1)
        s = s * rescale + tile_sum
        m = m_new

    at = tl.cast(split, tl.int64) * T + t
    tl.store(maximum + at, m, mask=inside)
    tl.store(total + at, s, mask=inside)
    tl.store(target_q + at, q_at_target, mask=inside)
    if weighted is not None:
        tl.store(weighted + at, u, mask=inside)


@kernel
def combine_kernel(
    maximum, total, weighted, target_q, targets,  # [splits, T] each, weighted may be None; [T]
    logprobs_out, max_out, log_sum_out, entropy_out,  # [T] each
    T, splits, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < T
    m = tl.full([BLOCK], LOWEST, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    u = tl.zeros([BLOCK], tl.float32)
    q = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * T + t
        part_max = tl.load(maximum + at, mask=inside, other=0.0)
        part_sum = tl.load(total + at, mask=inside, other=1.0)
        m_new = tl.maximum(m, part_max)
        old, new = tl.exp(m - m_new), tl.exp(part_max - m_new)
        if weighted is not None:
            part_weighted = tl.load(weighted + at, mask=inside, other=0.0)
            u = (u - s * tl.maximum(m - m_new, -1e4)) * old
            u += (part_weighted - part_sum * tl.maximum(part_max - m_new, -1e4)) * new
        s = s * old + part_sum * new
        m = m_new
        q += tl.load(target_q + at, mask=inside, other=0.0)  # 0 but in the part that holds the target

    kept = inside & (tl.load(targets + t, mask=inside, other=0) != ignore_index)
    log_sum = tl.log(s)
    tl.store(logprobs_out + t, tl.where(kept, (q - m) - log_sum, 0.0), mask=inside)
    tl.store(max_out + t, tl.where(kept, m, 0.0), mask=inside)
    tl.store(log_sum_out + t, tl.where(kept, log_sum, 0.0), mask=inside)
    if weighted is not None:
        tl.store(entropy_out + t, tl.where(kept, log_sum + u / s, 0.0), mask=inside)


def forward(
    operands: Operands, targets: Tensor, options: TokenStatsOptions, config: TileConfig
) -> tuple[Tensor, RowStats]:
    """The log-probs [T] and the rest."""
    T, V = len(operands.hidden), len(operands.weight)
    row_tiles, tiles = triton.cdiv(T, config.block_t), triton.cdiv(V, config.block_v)
    splits = min(tiles, triton.cdiv(program_count(targets.device), max(1, row_tiles)))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=targets.device)

    parts = [empty(splits, T), empty(splits, T), empty(splits, T) if options.entropy else None, empty(splits, T)]
    logprobs, maximum, log_sum = empty(T), empty(T), empty(T)
    entropy = empty(T) if options.entropy else None
    if T > 0:
        arguments = operands.arguments(config)
        forward_kernel[(row_tiles * splits,)](
            *arguments.tensors,
            targets,
            *parts,
            *arguments.sizes,
            splits,
            *operands.scaling[:2],
            **arguments.constants,
        )
        combine_kernel[(triton.cdiv(T, COMBINE_BLOCK),)](
            *parts,
            targets,
            logprobs,
            maximum,
            log_sum,
            entropy,
            T,
            splits,
            options.ignore_index,
            BLOCK=COMBINE_BLOCK,
            num_warps=COMBINE_WARPS,
        )
    return logprobs, RowStats(maximum, log_sum, entropy)
