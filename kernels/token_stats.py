"""`linear_token_stats`: log-probability, soft value and entropy of each token, straight from the hidden states.

T tokens, V vocabulary entries, D hidden width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends.interface import Backend, Needs, RowGrads, RowStats, TokenStatsOptions
from .backends.registry import select
from .checks import check_head, check_values, operand_dtype, temperatures
from .vocab_parallel import VocabSlice, sum_gradient


class TokenStats(NamedTuple):
    """Per token, [T] each, in float32 (float64 for float64 inputs); 0 where the target is ignored."""

    logprobs: Tensor
    """log pi(a|s) of the target."""
    lse: Tensor
    """V(s) = logsumexp of Q over the vocabulary."""
    entropy: Tensor | None
    """-sum p log p over the vocabulary; None unless asked for."""


@torch.compiler.disable
def linear_token_stats(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or [T]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    backend: str = "auto",
    tp_group: dist.ProcessGroup | None = None,
) -> TokenStats:
    """The statistics of the target tokens under Q = logits / temperature, where

        logits = logit_scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap) if softcap is given

    without holding [T, V] in any form (`reference.py` has the definition). Differentiable once, in hidden, weight and
    bias, through all three outputs. A NaN in a row makes that row's outputs NaN. Rows whose target is `ignore_index`
    are left out: their outputs are 0, and no gradient comes from them.

    hidden and weight share one of the dtypes bfloat16, float16, float32 and float64; bias may have any of them.
    Products and sums are in float32 (float64 for float64), and each gradient is rounded once, to its tensor's dtype.
    Under torch.autocast, hidden and weight are first rounded to its dtype, as a linear layer would do, and so may hidden's
    gradient be. In a model under torch.compile the graph breaks here.

    temperature: a number, or one for each token: rollouts that were sampled at several share a batch. It gets no gradient.
    backend: "auto", or a name from `backends()`.
    tp_group: processes over which the vocabulary is divided. Each passes the same hidden and targets, and its own rows of
        weight and bias, in the order of ranks; all get the statistics over the whole vocabulary, by collectives over [T]
        vectors (`vocab_parallel.py`). The loss must be the same on all of them.

    Raises ValueError or TypeError for arguments that do not fit, and RuntimeError for a backend that cannot run here.
    On a GPU a target out of range is found by a device-side assertion: reading it here would wait for the device.
    """
    check_head(hidden, weight, targets, bias, temperature)
    dtype = operand_dtype(hidden, weight)
    temperature = temperatures(temperature, dtype)
    options = TokenStatsOptions(dtype, temperature, softcap, logit_scale, entropy, ignore_index)
    part = None if tp_group is None else VocabSlice(weight, targets, ignore_index, tp_group)
    check_values(targets, weight.shape[0] if part is None else part.vocab, options)
    chosen = select(backend, hidden.device, options.operand_dtype)
    if part is None:
        return TokenStats(*_LinearTokenStats.apply(hidden, weight, bias, targets, options, chosen))
    hidden, options = sum_gradient(hidden, part.group), part.options_of(options)
    return TokenStats(*part.combine(*_LinearTokenStats.apply(hidden, weight, bias, part.targets, options, chosen)))


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: TokenStatsOptions,
        backend: Backend,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.autocast(hidden.device.type, enabled=False):
            logprobs, stats = backend.token_stats_forward(hidden, weight, bias, targets, options)
        ctx.save_for_backward(hidden, weight, bias, targets, *stats)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return logprobs, stats.lse, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, *rows = ctx.saved_tensors
        stats = RowStats(*rows)
        if all(grad is None for grad in grads):
            return (None,) * 6
        grad_logprobs, grad_lse, grad_entropy = grads
        row_grads = RowGrads(
            torch.zeros_like(stats.max) if grad_logprobs is None else grad_logprobs,
            torch.zeros_like(stats.max) if grad_lse is None else grad_lse,
            grad_entropy,
        )
        with torch.autocast(hidden.device.type, enabled=False):
            head_grads = ctx.backend.token_stats_backward(
                hidden, weight, bias, targets, ctx.options, stats, row_grads, Needs(*ctx.needs_input_grad[:3])
            )
        return (*head_grads, None, None, None)
