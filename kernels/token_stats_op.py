"""`linear_token_stats` as an operator of torch, for whoever traces a model instead of running it: `torch.compile`,
`torch.export`, fake and meta tensors.

In eager mode the same two functions are called without it: an operator that is defined in Python costs some 200 us a call
here, more than torch.autograd.Function, and `torch.func` does not go through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.interface import Backend, Needs, RowGrads, RowStats, TokenStatsOptions
from .backends.registry import select
from .checks import check_values

# The operators have the package's name, whatever it is imported as: from the root of this repository transformers takes the
# folder for a package called `kernels`, and an operator that is defined a second time destroys the first.
TAGS = (torch.Tag.cudagraph_unsafe,)  # some backends wait for the device


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: TokenStatsOptions, backend: Backend
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """logprobs, lse and entropy, and for the backward pass the two parts of the lse."""
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, stats = backend.token_stats_forward(hidden, weight, bias, targets, options)
    return logprobs, stats.lse, stats.entropy, stats.max, stats.log_sum


def gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    options: TokenStatsOptions,
    backend: Backend,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    row_grads = RowGrads(
        torch.zeros_like(maximum) if grad_logprobs is None else grad_logprobs,
        torch.zeros_like(maximum) if grad_lse is None else grad_lse,
        grad_entropy,
    )
    stats = RowStats(maximum, log_sum, entropy)
    with torch.autocast(hidden.device.type, enabled=False):
        return backend.token_stats_backward(hidden, weight, bias, targets, options, stats, row_grads, needs)


@torch.library.custom_op(f"{__package__}::linear_token_stats", mutates_args=(), tags=TAGS)
def token_stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `statistics` returns, but for an entropy that is empty where it is not asked for."""
    each = temperature if temperatures is None else temperatures
    options = TokenStatsOptions(dtype, each, softcap, logit_scale, entropy, ignore_index)
    check_values(targets, weight.shape[0], options)
    chosen = select(backend, hidden.device, dtype)
    logprobs, lse, entropies, *rest = statistics(hidden, weight, bias, targets, options, chosen)
    return logprobs, lse, lse.new_empty(0) if entropies is None else entropies, rest[0], rest[1]


@token_stats_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, ...]:
    lengths = [hidden.shape[0], hidden.shape[0], hidden.shape[0] if entropy else 0, hidden.shape[0], hidden.shape[0]]
    return tuple(hidden.new_empty(length, dtype=TokenStatsOptions(dtype).compute_dtype) for length in lengths)


@torch.library.custom_op(f"{__package__}::linear_token_stats_backward", mutates_args=(), tags=TAGS)
def token_stats_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    entropies: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    needs: list[bool],
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; empty where not needed."""
    each = temperature if temperatures is None else temperatures
    options = TokenStatsOptions(dtype, each, softcap, logit_scale, entropy, ignore_index)
    tensors = (hidden, weight, bias, targets, maximum, log_sum, entropies, grad_logprobs, grad_lse, grad_entropy)
    chosen = select(backend, hidden.device, dtype)
    found = gradients(*tensors, options=options, backend=chosen, needs=Needs(*needs))
    return or_empty(found[0], hidden), or_empty(found[1], hidden), or_empty(found[2], hidden)


@token_stats_backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[8]
    return tuple(like_gradient(x, needed, hidden) for x, needed in zip((hidden, weight, bias), needs, strict=True))


def or_empty(found: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns a tensor in any case; contiguous, as its fake says."""
    return like.new_empty(0) if found is None else found.contiguous()


def like_gradient(of: Tensor | None, needed: bool, like: Tensor) -> Tensor:
    return like.new_empty(0) if of is None or not needed else of.new_empty(of.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, temperatures, *ctx.rest = inputs
    entropies, maximum, log_sum = output[2:]
    ctx.save_for_backward(hidden, weight, bias, targets, temperatures, maximum, log_sum, entropies)
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * len(ctx.needs_input_grad)
    if all(grad is None for grad in grads):
        return none
    asked = ctx.rest[4]
    *tensors, entropies = ctx.saved_tensors
    of_entropy = (entropies, grads[2]) if asked else (None, None)
    needs = list(ctx.needs_input_grad[:3])
    found = token_stats_backward_op(*tensors, of_entropy[0], grads[0], grads[1], of_entropy[1], needs, *ctx.rest)
    return (*(grad if needed else None for grad, needed in zip(found, needs, strict=True)), *none[3:])


token_stats_op.register_autograd(_backward, setup_context=_setup_context)
