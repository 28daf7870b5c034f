"""What the torch backend does with one tile of Q-values.

Forward, per row, with the running maximum m (Milakov and Gimelshein, "Online normalizer calculation for softmax"):
    s = sum_v e^(q_v - m)      u = sum_v e^(q_v - m) (m - q_v)      log_sum = log s      entropy = log s + u / s
Backward, with p_v = e^(q_v - m) / s, the entropy H and the upstream gradients g:
    dL/dq_v = g_logprob 1[v = target] + (g_lse - g_logprob) p_v - g_entropy p_v (log p_v + H)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .interface import RowGrads, RowStats, TokenStatsOptions
from .kept_rows import KeptRows

ROW_CHUNK = 1024
SCRATCH_ELEMENTS = 2**21


class TiledLogits:
    """The Q-values, one [rows, vocabulary] tile at a time, in one scratch tensor that every tile reuses."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: TokenStatsOptions) -> None:
        self.options = options
        # NVIDIA GPUs multiply bfloat16 into float32. Elsewhere it is cast up first: the same exact products. float16 is
        # always cast up: the derivatives of a large vocabulary underflow in it.
        into_float32 = hidden.is_cuda and torch.version.cuda is not None and options.operand_dtype == torch.bfloat16
        self.product_dtype = options.operand_dtype if into_float32 else options.compute_dtype
        self.hidden = self._operand(hidden)
        self.weight = weight
        self.bias = None if bias is None else bias.to(options.compute_dtype)
        self.factor = options.factor

        n_rows, width = hidden.shape
        self.row_chunk = min(ROW_CHUNK, max(n_rows, 1))
        self.vocab_tile = min(weight.shape[0], max(1, SCRATCH_ELEMENTS // max(self.row_chunk, width)))
        self.scratch = torch.empty(self.row_chunk * self.vocab_tile, dtype=options.compute_dtype, device=hidden.device)

    def _operand(self, values: Tensor) -> Tensor:
        return values.to(self.options.operand_dtype).to(self.product_dtype)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for tile in slices(self.weight.shape[0], self.vocab_tile):
            yield tile, self._operand(self.weight[tile])

    def chunks(self) -> Iterator[slice]:
        return slices(self.hidden.shape[0], self.row_chunk)

    def q_values(
        self, chunk: slice, tile: slice, tile_weight: Tensor, with_slope: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Q [rows, vocabulary], valid until the next call, and on request the slope 1 - tanh^2 of the soft-capping."""
        shape = (chunk.stop - chunk.start, tile.stop - tile.start)
        q = self.scratch[: shape[0] * shape[1]].view(shape)
        if self.product_dtype == q.dtype:
            torch.mm(self.hidden[chunk], tile_weight.T, out=q)
        else:
            torch.mm(self.hidden[chunk], tile_weight.T, out_dtype=q.dtype, out=q)
        if self.bias is not None:
            q += self.bias[tile]

        cap = self.options.softcap
        if cap is None:
            plain = not isinstance(self.factor, Tensor) and self.factor == 1.0
            return (q if plain else q.mul_(_column(self.factor, chunk))), None
        q.mul_(self.options.logit_scale / cap).tanh_()
        slope = q.square().neg_().add_(1) if with_slope else None
        return q.mul_(_column(cap / self.options.temperature, chunk)), slope


class KeptLogits(TiledLogits):
    """All Q-values, [rows, V]: each tile is computed when it is first asked for, and handed out again after that."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: TokenStatsOptions) -> None:
        super().__init__(hidden, weight, bias, options)
        self.kept = torch.empty(hidden.shape[0], weight.shape[0], dtype=options.compute_dtype, device=hidden.device)
        self.complete = False

    def q_values(
        self, chunk: slice, tile: slice, tile_weight: Tensor, with_slope: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        kept = self.kept[chunk, tile]
        if not self.complete:
            q, _ = super().q_values(chunk, tile, tile_weight)
            kept.copy_(q)
            return q, None
        cap = self.options.softcap
        if cap is None:
            return kept, None
        return kept, 1 - (kept * _column(self.options.temperature / cap, chunk)).square_()


class OnlineSoftmax:
    """The statistics of all rows, as far as the vocabulary tiles have come."""

    def __init__(self, targets: Tensor, options: TokenStatsOptions) -> None:
        self.targets = targets
        zeros = torch.zeros(targets.shape, dtype=options.compute_dtype, device=targets.device)
        # Not -inf, which would make NaN of a tile that a -inf bias masks as a whole.
        self.max = torch.full_like(zeros, torch.finfo(zeros.dtype).min)
        self.sum = zeros
        self.weighted_sum = zeros.clone() if options.entropy else None  # u above
        self.target_q = zeros.clone()

    def update(self, chunk: slice, tile: slice, q: Tensor) -> None:
        """Takes in one tile of Q and overwrites it."""
        inside, column = _locate(self.targets[chunk], tile)
        self.target_q[chunk] = torch.where(inside, q.gather(1, column).squeeze(1), self.target_q[chunk])

        maximum = torch.maximum(self.max[chunk], q.amax(1))
        # The clamp changes nothing, since e^-1e4 is 0, but keeps infinities out of the products below.
        shift = (self.max[chunk] - maximum).clamp_(min=-1e4)
        rescale = shift.exp()
        q.sub_(maximum[:, None]).exp_()
        tile_sum = q.sum(1)
        if self.weighted_sum is not None:
            # entr(x) = -x log x, and 0 at 0, where x (m - q) would be 0 times infinity.
            tile_weighted_sum = torch.special.entr(q, out=q).sum(1)
            moved = self.weighted_sum[chunk] - self.sum[chunk] * shift
            self.weighted_sum[chunk] = moved * rescale + tile_weighted_sum
        self.sum[chunk] = self.sum[chunk] * rescale + tile_sum
        self.max[chunk] = maximum

    def finish(self) -> tuple[Tensor, RowStats]:
        log_sum = self.sum.log()
        entropy = None if self.weighted_sum is None else log_sum + self.weighted_sum / self.sum
        return (self.target_q - self.max) - log_sum, RowStats(self.max, log_sum, entropy)


class SoftmaxGrad:
    """dL/dQ times `factor`, from what the forward pass kept of each row and the upstream gradients.

    `target_factor`, `p_factor` and `entr_factor` are those, per row, of 1[v = target], p_v and -p_v log p_v.
    """

    def __init__(
        self,
        rows: KeptRows,
        targets: Tensor,
        stats: RowStats,
        grads: RowGrads,
        factor: float | Tensor,  # [kept rows] if a tensor
    ) -> None:
        self.targets = rows.gather(targets)
        self.max = rows.gather(stats.max)[:, None]
        self.inverse_sum = rows.gather(stats.log_sum).neg().exp_()[:, None]
        self.target_factor = factor * rows.gather(grads.logprobs)
        self.p_factor = (factor * rows.gather(grads.lse))[:, None] - self.target_factor[:, None]
        self.entr_factor = None  # entr(p) = -p log p
        if grads.entropy is not None and stats.entropy is not None:
            self.entr_factor = (factor * rows.gather(grads.entropy))[:, None]
            self.p_factor -= self.entr_factor * rows.gather(stats.entropy)[:, None]

    def of_tile(self, chunk: slice, tile: slice, q: Tensor) -> Tensor:
        """The derivative for one tile of Q, which it overwrites."""
        p = q.sub_(self.max[chunk]).exp_().mul_(self.inverse_sum[chunk])
        if self.entr_factor is None:
            grad = p.mul_(self.p_factor[chunk])
        else:
            grad = torch.special.entr(p).mul_(self.entr_factor[chunk]).addcmul_(p, self.p_factor[chunk])
        inside, column = _locate(self.targets[chunk], tile)
        return grad.scatter_add_(1, column, torch.where(inside, self.target_factor[chunk], 0)[:, None])


def _column(values: float | Tensor, chunk: slice) -> float | Tensor:
    """What a chunk's rows [rows, vocabulary] are multiplied with: a number, or one for each row."""
    return values[chunk, None] if isinstance(values, Tensor) else values


def slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _locate(targets: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in the tile [rows], and the column of each in it [rows, 1] (some column where it does not)."""
    column = targets - tile.start
    width = tile.stop - tile.start
    inside = (column >= 0) & (column < width)
    return inside, column.clamp_(0, width - 1)[:, None]
