"""The chunked backend: plain torch, correct on any device, never holds [T, V].

Vocabulary tiles are the outer loop and chunks of rows the inner one, so that each tile of the weight is cast once per
pass, and its gradient is summed over all rows before it is rounded, once, to the weight's dtype.

Memory beyond inputs and outputs: a few scratch tensors of at most SCRATCH_ELEMENTS (8 MiB each in float32) and some of
[T]; for 16-bit inputs also a copy of hidden and an accumulator of its gradient, both [T, D] in float32.
On a GPU each pass waits once for the device, to learn how many rows are not ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head_memory import torch_head_memory
from .interface import HeadGrads, Needs, RowGrads, RowStats, TokenStatsOptions
from .kept_rows import KeptRows
from .torch_tiles import KeptLogits, OnlineSoftmax, SoftmaxGrad, TiledLogits


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def token_stats_forward(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T]
    options: TokenStatsOptions,
) -> tuple[Tensor, RowStats]:
    rows = KeptRows(targets, options.ignore_index)
    return _forward(TiledLogits(rows.gather(hidden), weight, bias, options.rows(rows.gather)), rows, targets)


def token_stats_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: TokenStatsOptions,
    stats: RowStats,
    grads: RowGrads,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows = KeptRows(targets, options.ignore_index)
    logits = TiledLogits(rows.gather(hidden), weight, bias, options.rows(rows.gather))
    grad_weight = torch.empty_like(weight) if needs.weight else None
    grad_bias = torch.zeros_like(weight[:, 0], dtype=options.compute_dtype) if needs.bias else None
    softmax_grad = SoftmaxGrad(rows, targets, stats, grads, logits.factor)
    grad_hidden = _backward(logits, softmax_grad, needs.hidden, grad_weight, grad_bias, add=False)
    return (
        None if grad_hidden is None else rows.scatter(grad_hidden.to(hidden.dtype)),
        grad_weight,
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


class Head:
    """The backend's part of the single pass."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: TokenStatsOptions) -> None:
        self.weight, self.bias, self.options = weight, bias, options
        self.memory = torch_head_memory(len(weight), options.compute_dtype, weight.device.type)

    def chunk(self, hidden: Tensor, targets: Tensor, options: TokenStatsOptions) -> Chunk:
        return Chunk(self, hidden, targets, options)


class Chunk:
    """Some tokens, whose Q-values are kept for the backward pass."""

    def __init__(self, head: Head, hidden: Tensor, targets: Tensor, options: TokenStatsOptions) -> None:
        self._targets = targets
        self._rows = KeptRows(targets, options.ignore_index)
        gather = self._rows.gather
        self._logits = KeptLogits(gather(hidden), head.weight, head.bias, options.rows(gather))
        self.logprobs, self.stats = _forward(self._logits, self._rows, targets)
        self._logits.complete = True

    def backward(self, grads: RowGrads, into: HeadGrads, tokens: slice, *, last: bool) -> None:
        softmax_grad = SoftmaxGrad(self._rows, self._targets, self.stats, grads, self._logits.factor)
        grad_weight = into.accumulator
        if grad_weight is not None and into.fresh:
            grad_weight.zero_()
        needs_hidden = into.hidden is not None
        grad_hidden = _backward(self._logits, softmax_grad, needs_hidden, grad_weight, into.bias, add=True)
        if into.hidden is not None and grad_hidden is not None:
            into.hidden[tokens] = self._rows.scatter(grad_hidden)
        into.fresh = False


def _forward(logits: TiledLogits, rows: KeptRows, targets: Tensor) -> tuple[Tensor, RowStats]:
    softmax = OnlineSoftmax(rows.gather(targets), logits.options)
    for tile, tile_weight in logits.tiles():
        for chunk in logits.chunks():
            q, _ = logits.q_values(chunk, tile, tile_weight)
            softmax.update(chunk, tile, q)
    logprobs, stats = softmax.finish()
    entropy = None if stats.entropy is None else rows.scatter(stats.entropy)
    return rows.scatter(logprobs), RowStats(rows.scatter(stats.max), rows.scatter(stats.log_sum), entropy)


def _backward(
    logits: TiledLogits,
    softmax_grad: SoftmaxGrad,
    needs_hidden: bool,
    grad_weight: Tensor | None,  # [V, D], rounded to once, or if `add` an accumulator
    grad_bias: Tensor | None,  # [V], an accumulator
    *,
    add: bool,
) -> Tensor | None:
    """Computes grad_weight, or adds to it; adds to grad_bias; returns hidden's gradient in the compute dtype."""
    dtype = logits.options.compute_dtype
    grad_hidden = torch.zeros_like(logits.hidden, dtype=dtype) if needs_hidden else None
    for tile, tile_weight in logits.tiles():
        tile_grad = None
        if grad_weight is not None:
            tile_grad = grad_weight[tile] if add else torch.zeros_like(tile_weight, dtype=dtype)
        for chunk in logits.chunks():
            q, slope = logits.q_values(chunk, tile, tile_weight, with_slope=True)
            grad = softmax_grad.of_tile(chunk, tile, q)
            if slope is not None:
                grad *= slope
            if grad_bias is not None:
                grad_bias[tile] += grad.sum(0)
            grad = grad.to(tile_weight.dtype)
            if grad_hidden is not None:
                _add_product(grad_hidden[chunk], grad, tile_weight)
            if tile_grad is not None:
                _add_product(tile_grad, grad.T, logits.hidden[chunk])
        if grad_weight is not None and tile_grad is not None and not add:
            grad_weight[tile] = tile_grad
    return grad_hidden


def _add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """accumulator += a @ b, summed in the accumulator's dtype whatever that of a and b."""
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
    else:
        accumulator += torch.mm(a, b, out_dtype=accumulator.dtype)
