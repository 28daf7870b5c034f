"""`linear_token_stats`: log-probability, soft value and entropy of each token, straight from the hidden states.

T tokens, V vocabulary entries, D hidden width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backends.interface import Backend, Needs, TokenStatsOptions
from .backends.registry import select
from .checks import check_head, check_values, only_described, operand_dtype, temperatures
from .once import FirstDerivative
from .token_stats_op import gradients, statistics, token_stats_op
from .vocab_parallel import VocabSlice


class TokenStats(NamedTuple):
    """Per token, [T] each, in float32 (float64 for float64 inputs); 0 where the target is ignored."""

    logprobs: Tensor
    """log pi(a|s) of the target."""
    lse: Tensor
    """V(s) = logsumexp of Q over the vocabulary."""
    entropy: Tensor | None
    """-sum p log p over the vocabulary; None unless asked for."""


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
    """Log-probability, soft value and entropy of the target tokens under Q = logits / temperature, where

        logits = logit_scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap) if softcap is given

    without holding [T, V] in any form (`reference.py` has the definition). Differentiable once, in hidden, weight and
    bias, through all three outputs. A NaN in a row makes that row's outputs NaN.

    Products and sums are in float32 (float64 for float64), and each gradient is rounded once, to its tensor's dtype.
    Under torch.autocast, hidden and weight are first rounded to its dtype, as a linear layer would do, and so may hidden's
    gradient be. In a model under torch.compile it is one operation of the graph (with `tp_group` the graph breaks here).

    Args:
        hidden: [T, D], the hidden states that predict the targets, as they go into the head (after the last norm), batch and
            sequence flattened: bfloat16, float16, float32 or float64, on any device. T may be 0.
        weight: [V, D], the head's weight, of hidden's dtype and on its device, as all tensors are.
        targets: [T] int64, the token taken at each position, in [0, V), or `ignore_index`.
        bias: [V], added to the products hidden @ weight.T, of any of hidden's dtypes; None for a head without.
        temperature: divides the logits; above 0. A number, or [T] floating-point, one for each token: rollouts that were
            sampled at several share a batch. It gets no gradient.
        softcap: logits become softcap * tanh(logits / softcap); above 0. None for none.
        logit_scale: multiplies the logits before that; above 0.
        entropy: whether the entropy is computed too.
        ignore_index: targets of this value are left out: their statistics are 0, and no gradient comes from them.
        backend: "auto" takes the first that can run of those that `backends()` lists: "cpu" (C++), "triton" (NVIDIA GPUs),
            "torch" (everywhere). A name takes that one.
        tp_group: processes over which the vocabulary is divided. Each passes the same hidden and targets and its own rows
            of weight and bias, in the order of ranks; all get the statistics over the whole vocabulary, and hidden's
            gradient, by collectives. The loss must be the same on all of them.

    Returns:
        `TokenStats`: logprobs, lse and entropy, in nats, [T] each in float32 (float64 for float64 inputs).

    Raises:
        TypeError: for what is no tensor (a DTensor is none here), and for dtypes that do not fit.
        ValueError: for shapes that do not fit, tensors on several devices, targets out of range, a number that is not above
            0, and a backend of an unknown name. On a GPU a wrong value in a tensor is found by a device-side assertion:
            reading it here would wait for the device.
        RuntimeError: for a backend that cannot run here, with the reason; from the backward pass, if a second derivative is
            asked for.
    """
    check_head(hidden, weight, targets, bias, temperature)
    dtype = operand_dtype(hidden, weight)
    temperature = temperatures(temperature, dtype)
    if tp_group is None and only_described(hidden):
        number, each = (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
        scaling = (number, softcap, logit_scale, entropy, ignore_index)
        logprobs, lse, entropies, *_ = token_stats_op(hidden, weight, bias, targets, each, dtype, *scaling, backend)
        return TokenStats(logprobs, lse, entropies if entropy else None)
    options = TokenStatsOptions(dtype, temperature, softcap, logit_scale, entropy, ignore_index)
    return _now(hidden, weight, bias, targets, options, backend, tp_group)


@torch.compiler.disable
def _now(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: TokenStatsOptions,
    backend: str,
    group: dist.ProcessGroup | None,
) -> TokenStats:
    vocab_slice = None if group is None else VocabSlice(weight, targets, options.ignore_index, group)
    check_values(targets, weight.shape[0] if vocab_slice is None else vocab_slice.vocab, options)
    chosen = select(backend, hidden.device, options.operand_dtype)
    if vocab_slice is not None:
        hidden, targets, options = vocab_slice.inputs(hidden, options)
    stats = _LinearTokenStats.apply(hidden, weight, bias, targets, options, chosen)[:3]
    return TokenStats(*(stats if vocab_slice is None else vocab_slice.combine(*stats)))


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: TokenStatsOptions,
        backend: Backend,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        return statistics(hidden, weight, bias, targets, options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, options, backend = inputs
        _, _, entropy, maximum, log_sum = output
        ctx.save_for_backward(*tensors, maximum, log_sum, entropy)
        ctx.options, ctx.backend = options, backend
        ctx.mark_non_differentiable(maximum, log_sum)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 6
        options, backend, needs = ctx.options, ctx.backend, Needs(*ctx.needs_input_grad[:3])

        def compute(*tensors: Any) -> tuple[Tensor | None, ...]:
            return gradients(*tensors, options=options, backend=backend, needs=needs)

        return (*FirstDerivative.apply(compute, *ctx.saved_tensors, *grads[:3]), None, None, None)
