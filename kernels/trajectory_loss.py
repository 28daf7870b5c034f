"""The single pass for any loss over trajectories, and for autograd.

T tokens, V vocabulary entries, D hidden width, N trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import triton
from .backends.interface import Needs, RowGrads, TokenStatsOptions, held_dtype
from .backends.registry import select
from .checks import (
    check_head,
    check_per_token,
    check_values,
    needs_gradient,
    only_described,
    operand_dtype,
    temperatures,
)
from .once import FirstDerivative
from .single_pass import ChunkLoss, Plan, detached, single_pass
from .token_stats import TokenStats, linear_token_stats
from .trajectory import check_bounds, check_packing
from .vocab_parallel import VocabSlice

TrajectoryLossFn = Callable[..., Tensor]
"""(stats, cu_seqlens, first_trajectory, *per_token) -> []"""


@torch.compiler.disable
def fused_linear_trajectory_loss(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    cu_seqlens: Tensor,  # [N + 1] int32 or int64, rising from 0 to T
    loss_fn: TrajectoryLossFn,
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or [T]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: dist.ProcessGroup | None = None,
    per_token: Sequence[Tensor] = (),  # [T, ...] each
) -> tuple[Tensor, TokenStats]:
    """The sum of a loss over chunks of whole trajectories, and its gradients, in a single pass over the head.

    Any loss will do that is a sum over trajectories. The gradients of hidden, weight and bias are those of
    `linear_token_stats` and that loss. They are computed here, in the forward pass, and the backward pass scales them and
    hands them out, once: for a second backward pass over the same graph, call this function again. A factor of the loss
    belongs into `loss_fn`: one that is put on what is returned, and is no power of 2, rounds bfloat16 gradients a second
    time. (Those of float16 are kept in float32 until the loss's scale is known.) Under torch.no_grad, or where nothing
    requires a gradient, none is computed.

    In a model under torch.compile the graph breaks here, since `loss_fn` is any function; `linear_token_stats` and a loss of
    yours do not break it. Fake and meta tensors go that way, with `loss_fn` called once for all trajectories. On a GPU the
    call waits for nothing, but where there is more than one chunk: then once, for `cu_seqlens`.

    Args:
        hidden: [T, D], the hidden states that predict the targets, as they go into the head (after the last norm), batch and
            sequence flattened: bfloat16, float16, float32 or float64, on any device. T may be 0.
        weight: [V, D], the head's weight, of hidden's dtype and on its device, as all tensors are.
        targets: [T] int64, the token taken at each position, in [0, V), or `ignore_index`.
        cu_seqlens: [N + 1] int32 or int64, rising from 0 to T: trajectory i owns tokens cu_seqlens[i]:cu_seqlens[i + 1]. The
            tokens are the policy's actions and nothing else: leave those of prompts and tools out before packing.
        loss_fn: (stats, cu_seqlens, first_trajectory, *per_token) -> [], the sum of the losses of the trajectories in a
            chunk. `stats` are the chunk's `TokenStats`, `cu_seqlens` its own bounds, from 0 on, and `first_trajectory` is
            the index of the first of them among all N. It is differentiated in `stats` and in its share of each tensor in
            `per_token`; a parameter that it reads in another way (a learnt log Z) gets no gradient.
        bias: [V], added to the products hidden @ weight.T, of any of hidden's dtypes; None for a head without.
        temperature: divides the logits; above 0. A number, or [T] floating-point, one for each token: rollouts that were
            sampled at several share a batch. It gets no gradient.
        softcap: logits become softcap * tanh(logits / softcap); above 0. None for none.
        logit_scale: multiplies the logits before that; above 0.
        entropy: whether `stats` have the entropy too.
        ignore_index: targets of this value are left out: their statistics are 0, and no gradient comes from them.
        max_chunk_bytes: of scratch memory for the logits of a chunk of whole trajectories. If None, 1 KiB x V on a CPU (512
            tokens in bfloat16, 256 in float32) and 16 KiB x V on a GPU (8192 and 4096); but where all T tokens take no more
            than that and the sum that the weight's gradient needs beside it over several chunks (of a 16-bit weight 2 V D
            on a CPU, 4 V D on a GPU), one chunk takes them all. A trajectory that does not fit is computed twice instead,
            in pieces that do: four products.
        backend: "auto" takes the first that can run of those that `backends()` lists: "cpu" (C++), "triton" (NVIDIA GPUs),
            "torch" (everywhere). A name takes that one.
        tp_group: processes over which the vocabulary is divided. Each passes the same hidden and targets and its own rows
            of weight and bias, in the order of ranks; all get the statistics over the whole vocabulary, and hidden's
            gradient, by collectives. The loss must be the same on all of them.
        per_token: tensors [T, ...], floating-point, whose share of each chunk `loss_fn` is given (a critic's values, say), and
            which get their gradient.

    Returns:
        The loss, [], and the `TokenStats` of all tokens, [T] each in float32 (float64 for float64 inputs), which carry no
        gradient.

    Raises:
        TypeError: for what is no tensor (a DTensor is none here), and for dtypes that do not fit.
        ValueError: for shapes that do not fit, tensors on several devices, targets out of range, bounds that do not rise
            from 0 to T, a number that is not above 0, and a backend of an unknown name. On a GPU a wrong value in a tensor
            is found by a device-side assertion: reading it here would wait for the device.
        RuntimeError: for a backend that cannot run here, with the reason; from the backward pass, if a second derivative is
            asked for, or a second backward pass over the same graph.
    """
    check_head(hidden, weight, targets, bias, temperature)
    check_packing("targets", targets, cu_seqlens)
    check_per_token(per_token, hidden)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}: it must be a function of (stats, cu_seqlens, first)")
    if only_described(hidden):
        scaling: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        rest: dict[str, Any] = {"entropy": entropy, "ignore_index": ignore_index, "backend": backend}
        stats = linear_token_stats(hidden, weight, targets, bias=bias, **scaling, **rest)
        return loss_fn(stats, cu_seqlens, 0, *per_token), detached(stats)
    dtype = operand_dtype(hidden, weight)
    temperature = temperatures(temperature, dtype)
    options = TokenStatsOptions(dtype, temperature, softcap, logit_scale, entropy, ignore_index)
    loss_of = partial(_AnyLoss, loss_fn)
    inputs = (hidden, weight, bias, targets)
    return differentiable(inputs, cu_seqlens, loss_of, options, backend, max_chunk_bytes, tp_group, per_token)


def differentiable(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    cu_seqlens: Tensor,
    loss_of: Callable[..., ChunkLoss],
    options: TokenStatsOptions,
    backend: str,
    max_chunk_bytes: int | None,
    group: dist.ProcessGroup | None,
    per_token: Sequence[Tensor] = (),
) -> tuple[Tensor, TokenStats]:
    """The single pass, differentiable. `loss_of(per_token=, needs=)` makes the loss that is to differentiate `per_token`."""
    hidden, weight, bias, targets = inputs
    vocab_slice = None if group is None else VocabSlice(weight, targets, options.ignore_index, group)
    check_values(targets, weight.shape[0] if vocab_slice is None else vocab_slice.vocab, options)
    check_bounds("targets", targets, cu_seqlens)
    if max_chunk_bytes is not None and max_chunk_bytes <= 0:
        raise ValueError(f"max_chunk_bytes is {max_chunk_bytes!r}: it must be above 0, or None for the default")
    chosen = select(backend, hidden.device, options.operand_dtype)
    if vocab_slice is not None:
        hidden, targets, options = vocab_slice.inputs(hidden, options)
    needs, per_token_needs = Needs(*map(needs_gradient, (hidden, weight, bias))), [needs_gradient(x) for x in per_token]
    plan = Plan(cu_seqlens, options, chosen, max_chunk_bytes, needs, any(needs) or any(per_token_needs), vocab_slice)
    loss, *stats = _SinglePass.apply(
        partial(loss_of, needs=per_token_needs), plan, hidden, weight, bias, targets, *per_token
    )[:4]
    return loss, TokenStats(*stats)


class _AnyLoss:
    """`loss_fn`, differentiated by autograd; the gradients of `per_token`, of those that need one, in `grads`."""

    def __init__(self, loss_fn: TrajectoryLossFn, per_token: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self._loss_fn, self._per_token = loss_fn, per_token
        self.grads = [
            torch.zeros_like(x, dtype=held_dtype(x.dtype)) if needed else None
            for x, needed in zip(per_token, needs, strict=True)
        ]

    def __call__(
        self, stats: TokenStats, tokens: slice, cu_seqlens: Tensor, first: int, differentiate: bool
    ) -> tuple[Tensor, RowGrads | None]:
        leaves = detached(stats, differentiate=differentiate)
        shares = [
            values[tokens].detach().requires_grad_(differentiate and grad is not None)
            for values, grad in zip(self._per_token, self.grads, strict=True)
        ]
        with torch.set_grad_enabled(differentiate):
            loss = self._loss_fn(leaves, cu_seqlens, first, *shares)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss_fn returned a {type(loss).__name__}: it must return a tensor [], the sum over its trajectories"
            )
        if loss.dim() != 0:
            raise ValueError(f"loss_fn returned {list(loss.shape)}: it must return [], the sum over its trajectories")
        if not differentiate:
            return loss.detach(), None
        inputs = [leaf for leaf in (*leaves, *shares) if leaf is not None and leaf.requires_grad]
        found = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else [None] * len(inputs)
        grad_logprobs, grad_lse, *others = found
        # None, not zeros, if left out: that spares work.
        grad_entropy = None if stats.entropy is None else others.pop(0)
        for whole in self.grads:
            if whole is not None and (grad := others.pop(0)) is not None:
                whole[tokens] = grad
        return loss.detach(), RowGrads(
            torch.zeros_like(stats.logprobs) if grad_logprobs is None else grad_logprobs,
            torch.zeros_like(stats.lse) if grad_lse is None else grad_lse,
            grad_entropy,
        )


class _SinglePass(torch.autograd.Function):
    @staticmethod
    def forward(
        loss_of: Callable[..., ChunkLoss],
        plan: Plan,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        *per_token: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """The loss, the three statistics, and the gradients: of hidden, weight, bias and `per_token`."""
        chunk_loss = loss_of(per_token=per_token)
        loss, stats, grads = single_pass(hidden, weight, bias, targets, chunk_loss, plan)
        return loss, *stats, *grads, *chunk_loss.grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        loss, *others = output
        ctx.save_for_backward(loss)
        ctx.grads = others[3:]
        ctx.dtypes = [None if x is None else x.dtype for x in (*inputs[2:5], *inputs[6:])]
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the gradients of fused_linear_trajectory_loss were handed out by an earlier backward pass over this graph: "
                "call it again, or use linear_token_stats"
            )
        if torch.is_grad_enabled():  # create_graph, or torch.func: the loss stands for all that the gradients depend on
            grads = FirstDerivative.apply(partial(_scaled, ctx.dtypes), *ctx.saved_tensors, grad_loss, *ctx.grads)
        else:
            grads, ctx.grads = ctx.grads, None
            for grad in grads:
                if grad is not None:
                    _multiply_(grad, grad_loss)
            grads = [None if x is None else x.to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)]
        return (None, None, *grads[:3], None, *grads[3:])


def _scaled(
    dtypes: Sequence[torch.dtype], loss: Tensor, factor: Tensor, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else (x * factor).to(dtype) for x, dtype in zip(grads, dtypes, strict=True))


def _multiply_(grad: Tensor, factor: Tensor) -> None:
    if factor.is_cuda:  # reading it would be a sync point
        kernel = triton.why_not(grad.device, grad.dtype) is None and grad.is_contiguous()
        triton.multiply_(grad, factor) if kernel else grad.mul_(factor)
    elif factor.item() != 1:
        grad.mul_(factor)
