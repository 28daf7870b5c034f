"""The backend's part of `linear_token_stats` and of the single pass: kernels for the softmax, cuBLAS for the gradients.

Every gradient is summed in float32 and rounded once. Rows whose target is ignored are computed like all others and
left out at the end, so that nothing has to wait for the device to learn which they are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..head_memory import triton_head_memory
from ..interface import HeadGrads, Needs, RowGrads, RowStats, TokenStatsOptions
from .dlogits import dlogits
from .exp_rows import exp_rows_
from .exps import exps
from .forward import forward
from .launch import Operands, choose_config, scaling
from .logit_rows import row_dlogits_, row_stats

SCRATCH_BYTES = 2**28
"""Of dL/dlogits of a slice of the vocabulary. Wide slices pay: hidden's gradient is read and written once per slice."""


def token_stats_forward(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [T]
    options: TokenStatsOptions,
) -> tuple[Tensor, RowStats]:
    operands, targets = Operands(hidden, weight, bias, options), targets.contiguous()
    if options.operand_dtype == torch.bfloat16 and len(targets) > 0:
        found = exps(operands, targets, options, out=None)
        return found.logprobs, found.stats
    run = partial(forward, operands, targets, options)
    return run(choose_config(operands, run))


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
    operands, targets, grads = Operands(hidden, weight, bias, options), targets.contiguous(), _contiguous(grads)
    config = choose_config(operands, partial(forward, operands, targets, options))
    (T, D), V = hidden.shape, len(weight)
    operand_dtype = options.operand_dtype
    kept_hidden = kept_rows(operands.hidden[:, :D], targets, options)

    per_tile = T * config.block_v * operand_dtype.itemsize
    width = config.block_v * max(1, SCRATCH_BYTES // max(1, per_tile))
    scratch = hidden.new_empty(T * min(V, width), dtype=operand_dtype)
    grad_hidden = hidden.new_zeros(T, D, dtype=torch.float32) if needs.hidden else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs.weight else None
    grad_bias = weight.new_empty(V, dtype=bias.dtype) if needs.bias and bias is not None else None
    for start in range(0, V, width):
        part = slice(start, min(start + width, V))
        grad_logits = scratch[: T * (part.stop - start)].view(T, part.stop - start)
        if T > 0:
            dlogits(operands, targets, options, stats, grads, part, grad_logits, config)
        if grad_hidden is not None:
            add_product(grad_hidden, grad_logits, operands.weight[part, :D])
        if grad_weight is not None:
            grad_weight[part] = product(grad_logits.T, kept_hidden)
        if grad_bias is not None:
            grad_bias[part] = grad_logits.sum(0, dtype=torch.float32)
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


class Head:
    """A head whose weight has the dtype of the products."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: TokenStatsOptions) -> None:
        self.weight, self.options = weight.to(options.operand_dtype), options
        self.bias = None if bias is None else bias.contiguous()
        # What is written of a capped logit has its slope in it, from which its own logarithm cannot be had back.
        capped_entropy = options.entropy and options.softcap is not None
        self._keeps_exps = options.operand_dtype == torch.bfloat16 and not capped_entropy
        vocab, width = weight.shape
        self.memory = triton_head_memory(vocab, width, weight.dtype, exps=self._keeps_exps)
        self._dtype = torch.bfloat16 if self._keeps_exps else torch.float32
        self._pitch = self.memory.token_bytes // self._dtype.itemsize
        self._scratch = weight.new_empty(0, dtype=self._dtype)

    def chunk(self, hidden: Tensor, targets: Tensor, options: TokenStatsOptions) -> ExpsChunk | LogitsChunk:
        """Valid until the next call: chunks share their scratch memory."""
        size = len(hidden) * self._pitch
        if self._scratch.numel() < size:
            self._scratch = self._scratch.new_empty(size)
        scratch = self._scratch[:size].view(len(hidden), self._pitch)[:, : len(self.weight)]
        return (ExpsChunk if self._keeps_exps else LogitsChunk)(self, hidden, targets, options, scratch)


class ExpsChunk:
    """Some tokens with the exponentials of their logits in `scratch`, which become their derivatives but for a factor."""

    def __init__(
        self, head: Head, hidden: Tensor, targets: Tensor, options: TokenStatsOptions, scratch: Tensor
    ) -> None:
        self._head, self._options, self._targets = head, options, targets.contiguous()
        self._operands = Operands(hidden, head.weight, head.bias, options)
        self._exps = exps(self._operands, self._targets, options, scratch)
        self.logprobs, self.stats = self._exps.logprobs, self._exps.stats

    def backward(self, grads: RowGrads, into: HeadGrads, tokens: slice, *, last: bool) -> None:
        head = self._head
        factors, scaled = exp_rows_(self._exps, self._operands, self._targets, self._options, _contiguous(grads))
        values, scaled = self._exps.values, scaled[:, : head.weight.shape[1]]
        assert values is not None
        if into.hidden is not None:
            torch.mul(product(values, head.weight), factors[:, None], out=into.hidden[tokens])
        if into.weight is not None and into.fresh and last and into.weight.dtype == values.dtype:
            rounded_product(values.T, scaled, out=into.weight)
        else:
            _add_to_weight(into, values.T, scaled)
        if into.bias is not None:
            into.bias += product(values.T, factors[:, None].to(values.dtype))[:, 0]
        into.fresh = False


class LogitsChunk:
    """Some tokens with their logits in `scratch`, which become their derivatives."""

    def __init__(
        self, head: Head, hidden: Tensor, targets: Tensor, options: TokenStatsOptions, scratch: Tensor
    ) -> None:
        self._head, self._options, self._targets, self._logits = head, options, targets.contiguous(), scratch
        self._hidden = kept_rows(hidden.to(options.operand_dtype), targets, options)
        product(self._hidden, head.weight.T, out=scratch)
        self._scaling = scaling(options)
        self.logprobs, self.stats = row_stats(scratch, head.bias, self._targets, options, self._scaling)

    def backward(self, grads: RowGrads, into: HeadGrads, tokens: slice, *, last: bool) -> None:
        head = self._head
        grad_logits = row_dlogits_(
            self._logits, head.bias, self._targets, self._options, self._scaling, self.stats, _contiguous(grads)
        )
        if into.hidden is not None:
            into.hidden[tokens] = product(grad_logits, head.weight)
        _add_to_weight(into, grad_logits.T, self._hidden)
        if into.bias is not None:
            into.bias += grad_logits.sum(0, dtype=torch.float32)
        into.fresh = False


def kept_rows(hidden: Tensor, targets: Tensor, options: TokenStatsOptions) -> Tensor:
    """hidden, with zeros in the rows whose target is ignored: 0 times a NaN there would be a NaN."""
    return hidden.masked_fill((targets == options.ignore_index)[:, None], 0)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32, never rounded to the dtype of a and b on the way."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def rounded_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b, summed in float32 and rounded once."""
    if not a.is_cuda:
        out.copy_(product(a, b))
        return
    switches = torch.backends.cuda.matmul
    allowed = switches.allow_bf16_reduced_precision_reduction
    switches.allow_bf16_reduced_precision_reduction = False
    try:
        torch.mm(a, b, out=out)
    finally:
        switches.allow_bf16_reduced_precision_reduction = allowed


def add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """accumulator += a @ b in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        accumulator.addmm_(a.float(), b.float())
    else:
        torch.addmm(accumulator, a, b, out_dtype=torch.float32, out=accumulator)


def _add_to_weight(into: HeadGrads, a: Tensor, b: Tensor) -> None:
    if (accumulator := into.accumulator) is None:
        return
    if into.fresh:
        product(a, b, out=accumulator)
    else:
        add_product(accumulator, a, b)


def _contiguous(grads: RowGrads) -> RowGrads:
    """Autograd may hand over one value for all tokens, with stride 0."""
    return RowGrads(*(None if grad is None else grad.contiguous() for grad in grads))  # type: ignore[arg-type]
