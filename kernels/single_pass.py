"""The single pass: a loss over trajectories and all of its gradients in three matrix products, one chunk at a time.

A loss like TBRM's needs a whole trajectory before it has a gradient, so the usual way is to compute the logits again in
the backward pass: four products of T x V x D. Chunks that hold whole trajectories need three. Per chunk:

    logits = hidden @ weight.T                         kept, in at most `max_chunk_bytes`
    logprobs, lse, entropy                             one pass over them
    dL/dlogprobs, dL/dlse, dL/dentropy                 autograd through `loss_fn`, on vectors of the chunk's tokens
    logits become dL/dlogits                           in place
    grad_hidden = dlogits @ weight, grad_weight += dlogits.T @ hidden

T tokens, V vocabulary entries, D hidden width, N trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import triton
from .backends.interface import Backend, Head, HeadGrads, Needs, RowGrads, TokenStatsOptions
from .backends.registry import select
from .checks import check_head, check_values, operand_dtype, temperatures
from .token_stats import TokenStats
from .trajectory import check_packing, check_vector, segment_sums, trajectory_residual
from .vocab_parallel import VocabSlice, sum_gradient

CHUNK_BYTES_PER_VOCABULARY_ENTRY = {"cpu": 1024, "cuda": 16384}
"""The default of `max_chunk_bytes` by device, times V. On a CPU room for 512 tokens in bfloat16 and 256 in float32 (32 MiB
at V = 32768); on a GPU for 4096, so that the products outweigh reading and writing the weight's gradient once per chunk."""

TrajectoryLossFn = Callable[[TokenStats, Tensor, int], Tensor]


def default_chunk_bytes(device_type: str, vocab: int) -> int:
    """What `max_chunk_bytes` is where None is given and there are several chunks."""
    per_entry = CHUNK_BYTES_PER_VOCABULARY_ENTRY
    return per_entry.get(device_type, per_entry["cpu"]) * vocab


class TbrmOutput(NamedTuple):
    """Only `loss` carries a gradient. [N] each, in float32 (float64 for float64 inputs)."""

    loss: Tensor
    """[], the mean of the squared residuals."""
    residuals: Tensor
    values: Tensor
    """V(s_1); 0 for an empty trajectory."""
    logprob_sums: Tensor
    """sum_h log pi(a_h|s_h)."""


@torch.compiler.disable
def fused_linear_tbrm_loss(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    cu_seqlens: Tensor,  # [N + 1] int32 or int64, rising from 0 to T
    ref_logprob_sums: Tensor,  # [N] float32
    rewards: Tensor,  # [N] float32
    *,
    beta: float,
    ref_values: Tensor | None = None,  # [N] float32
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or [T]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: dist.ProcessGroup | None = None,
) -> TbrmOutput:
    """The TBRM loss of packed trajectories (arXiv 2505.15311), from hidden states to gradients in a single pass:

        loss = mean of residual^2, with the residual of `trajectory_residual`

    0 if there are no trajectories. Arguments and errors are those of `trajectory_residual` and `fused_linear_trajectory_loss`.
    """
    check_head(hidden, weight, targets, bias, temperature)
    check_packing("targets", targets, cu_seqlens)
    n_trajectories = cu_seqlens.shape[0] - 1
    scores = {"ref_logprob_sums": ref_logprob_sums, "rewards": rewards, "ref_values": ref_values}
    _check_scores(hidden, weight, scores, n_trajectories)
    residuals, values, sums = [], [], []

    def squared_residuals(stats: TokenStats, bounds: Tensor, first: int) -> Tensor:
        here = slice(first, first + bounds.shape[0] - 1)
        reference = None if ref_values is None else ref_values[here]
        residual = trajectory_residual(
            stats.logprobs, stats.lse, bounds, ref_logprob_sums[here], rewards[here], beta, ref_values=reference
        )
        residuals.append(residual.detach())
        values.append(torch.cat([stats.lse.detach(), stats.lse.new_zeros(1)])[bounds[:-1]] * (bounds.diff() > 0))
        sums.append(segment_sums(stats.logprobs.detach(), bounds))
        return residual.square().sum() / max(1, n_trajectories)

    loss, _ = fused_linear_trajectory_loss(
        hidden,
        weight,
        targets,
        cu_seqlens,
        squared_residuals,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        max_chunk_bytes=max_chunk_bytes,
        backend=backend,
        tp_group=tp_group,
    )
    nothing = [loss.new_zeros(0)]
    return TbrmOutput(loss, *(torch.cat(parts or nothing) for parts in (residuals, values, sums)))


def _check_scores(hidden: Tensor, weight: Tensor, scores: Mapping[str, Tensor | None], count: int) -> None:
    dtype = torch.promote_types(operand_dtype(hidden, weight), torch.float32)
    for name, tensor in scores.items():
        if tensor is not None:
            check_vector(name, tensor, count, dtype, hidden.device)


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
) -> tuple[Tensor, TokenStats]:
    """The sum of `loss_fn` over chunks of whole trajectories, [], and the statistics of all tokens, which carry no gradient.

        loss_fn(stats, cu_seqlens, first_trajectory) -> [], the sum of the losses of the trajectories in the chunk

    `stats` are the chunk's TokenStats, `cu_seqlens` its own bounds, from 0 on, and `first_trajectory` is the index of the
    first of them among all N. Any loss will do that is a sum over trajectories. It is differentiated in `stats` alone: a
    parameter that it reads (a value head, a learnt log Z) gets no gradient.

    The gradients of hidden, weight and bias are those of `linear_token_stats` and that loss. They are computed here, in
    the forward pass, and the backward pass scales them and hands them out, once: for a second backward pass over the
    same graph, call this function again. A factor of the loss belongs into `loss_fn`: one that is put on what is
    returned, and is no power of 2, rounds 16-bit gradients a second time. Under torch.no_grad, or where nothing requires a
    gradient, none is computed.

    max_chunk_bytes: of scratch memory for the logits of a chunk. If None, 1 KiB x V on a CPU (512 tokens in bfloat16, 256 in
        float32) and 16 KiB x V on a GPU (4096 tokens); but where all T tokens take no more than that and the sum that the
        weight's gradient needs beside it over several chunks (2 V D for a 16-bit weight on a CPU), one chunk takes them all.
        A trajectory that does not fit is computed twice instead, in pieces that do: four products.
    The other arguments, and the errors raised, are those of `linear_token_stats`. On a GPU the call waits for nothing, but
    where there is more than one chunk: then once, for `cu_seqlens`.
    """
    check_head(hidden, weight, targets, bias, temperature)
    dtype = operand_dtype(hidden, weight)
    temperature = temperatures(temperature, dtype)
    options = TokenStatsOptions(dtype, temperature, softcap, logit_scale, entropy, ignore_index)
    part = None if tp_group is None else VocabSlice(weight, targets, ignore_index, tp_group)
    check_values(targets, weight.shape[0] if part is None else part.vocab, options)
    check_packing("targets", targets, cu_seqlens)
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is a {type(loss_fn).__name__}: it must be a function of (stats, cu_seqlens, first_trajectory)"
        )
    if max_chunk_bytes is not None and max_chunk_bytes <= 0:
        raise ValueError(f"max_chunk_bytes is {max_chunk_bytes!r}: it must be above 0, or None for the default")
    chosen = select(backend, hidden.device, options.operand_dtype)
    if part is not None:
        hidden, targets, options = sum_gradient(hidden, part.group), part.targets, part.options_of(options)
    plan = _Plan(cu_seqlens, loss_fn, options, chosen, max_chunk_bytes, torch.is_grad_enabled(), part)
    loss, *stats = _SinglePass.apply(hidden, weight, bias, targets, plan)
    return loss, TokenStats(*stats)


@dataclass(frozen=True)
class _Plan:
    cu_seqlens: Tensor
    loss_fn: TrajectoryLossFn
    options: TokenStatsOptions
    backend: Backend
    max_chunk_bytes: int | None
    grad_enabled: bool
    vocab_slice: VocabSlice | None


class _SinglePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        needs = Needs(*(plan.grad_enabled and needed for needed in ctx.needs_input_grad[:3]))
        with torch.autocast(hidden.device.type, enabled=False):
            loss, stats, grads = _run(hidden, weight, bias, targets, plan, needs)
        ctx.grads = grads
        ctx.mark_non_differentiable(*(values for values in stats if values is not None))
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the gradients of fused_linear_trajectory_loss were handed out by an earlier backward pass over this graph: "
                "call it again, or use linear_token_stats"
            )
        grads, ctx.grads = ctx.grads, None
        for grad in grads:
            if grad is not None:
                _multiply_(grad, grad_loss)
        return (*grads, None, None)


def _multiply_(grad: Tensor, factor: Tensor) -> None:
    if factor.is_cuda:  # reading it would be a sync point
        kernel = triton.why_not(grad.device, grad.dtype) is None and grad.is_contiguous()
        triton.multiply_(grad, factor) if kernel else grad.mul_(factor)
    elif factor.item() != 1:
        grad.mul_(factor)


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan, needs: Needs
) -> tuple[Tensor, TokenStats, tuple[Tensor | None, ...]]:
    options = plan.options
    head = plan.backend.Head(weight, bias, options)
    max_tokens = _tokens_of_a_chunk(head, plan, needs, hidden.shape[0])
    if plan.vocab_slice is not None:  # all processes must go through the same chunks
        max_tokens = plan.vocab_slice.fewest(max_tokens)
    into = HeadGrads(hidden, weight, options, needs)
    vector = hidden.new_empty(hidden.shape[0], dtype=options.compute_dtype)
    all_stats = TokenStats(vector, vector.clone(), vector.clone() if options.entropy else None)
    loss = vector.new_zeros(())
    for first, last, tokens in _whole_trajectories(plan.cu_seqlens, hidden.shape[0], max_tokens):
        own = options.of(tokens)
        keep = any(needs) and 0 < tokens.stop - tokens.start <= max_tokens
        chunk = head.chunk(hidden[tokens], targets[tokens], own) if keep else None
        if chunk is not None:
            logprobs, stats = chunk.logprobs, chunk.stats
        else:
            logprobs, stats = plan.backend.token_stats_forward(hidden[tokens], weight, bias, targets[tokens], own)
        local = TokenStats(logprobs, stats.lse, stats.entropy)
        relative = plan.cu_seqlens[first : last + 1] - tokens.start
        part_loss, part, row_grads = _loss_and_gradients(plan, local, tokens, relative, first, any(needs))
        for whole, values in zip(all_stats, part, strict=True):
            if whole is not None and values is not None:
                whole[tokens] = values
        loss += part_loss
        if chunk is not None:
            chunk.backward(row_grads, into, tokens, last=tokens.stop == hidden.shape[0])
        elif any(needs):
            _recompute(head, hidden, targets, options, tokens, row_grads, into, max_tokens)
    return loss, all_stats, into.finish(bias)


def _tokens_of_a_chunk(head: Head, plan: _Plan, needs: Needs, tokens: int) -> int:
    """At most. By default all `tokens`, if that takes no more memory than several chunks and the sum of their gradients."""
    if plan.max_chunk_bytes is not None:
        return head.tokens_within(plan.max_chunk_bytes)
    usual = default_chunk_bytes(head.weight.device.type, head.weight.shape[0])
    alone = head.tokens_within(usual + needs.weight * head.sum_bytes)
    return alone if tokens <= alone else head.tokens_within(usual)


def _whole_trajectories(cu_seqlens: Tensor, tokens: int, max_tokens: int) -> Iterator[tuple[int, int, slice]]:
    """Runs of trajectories (first, last + 1) and their tokens, at most `max_tokens`; one that has more is a run of its own.

    The bounds are read only where there is more than one run, since on a GPU that means waiting for it.
    """
    count = cu_seqlens.shape[0] - 1
    if tokens <= max_tokens:
        if count > 0:
            yield 0, count, slice(0, tokens)
        return
    bounds = cu_seqlens.tolist()
    first = 0
    for last in range(1, count + 1):
        if last - first > 1 and bounds[last] - bounds[first] > max_tokens:
            yield first, last - 1, slice(bounds[first], bounds[last - 1])
            first = last - 1
    yield first, count, slice(bounds[first], bounds[count])


def _loss_and_gradients(
    plan: _Plan, local: TokenStats, tokens: slice, cu_seqlens: Tensor, first: int, differentiate: bool
) -> tuple[Tensor, TokenStats, RowGrads]:
    """The loss of a chunk, the statistics over the whole vocabulary, and the loss's derivatives by those of this process."""
    leaves = [None if values is None else values.detach().requires_grad_(differentiate) for values in local]
    with torch.set_grad_enabled(differentiate):
        stats = TokenStats(*leaves)  # type: ignore[arg-type]
        if plan.vocab_slice is not None:
            stats = TokenStats(*plan.vocab_slice.combine(*stats, tokens=tokens))
        loss = plan.loss_fn(stats, cu_seqlens, first)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss_fn returned a {type(loss).__name__}: it must return a tensor [], the sum over its trajectories"
        )
    if loss.dim() != 0:
        raise ValueError(f"loss_fn returned {list(loss.shape)}: it must return [], the sum over its trajectories")
    inputs = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else [None] * len(inputs)
    of_logprobs, of_lse, *of_entropy = found
    grads = RowGrads(
        torch.zeros_like(local.logprobs) if of_logprobs is None else of_logprobs,
        torch.zeros_like(local.lse) if of_lse is None else of_lse,
        of_entropy[0] if of_entropy else None,  # None, not zeros, where the loss leaves it out: that spares work
    )
    detached = TokenStats(*(None if values is None else values.detach() for values in stats))  # type: ignore[arg-type]
    return loss.detach(), detached, grads


def _recompute(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    options: TokenStatsOptions,
    tokens: slice,
    grads: RowGrads,
    into: HeadGrads,
    max_tokens: int,
) -> None:
    """The gradients of one trajectory that does not fit, in pieces that do."""
    for start in range(tokens.start, tokens.stop, max_tokens):
        piece = slice(start, min(start + max_tokens, tokens.stop))
        within = slice(piece.start - tokens.start, piece.stop - tokens.start)
        chunk = head.chunk(hidden[piece], targets[piece], options.of(piece))
        chunk.backward(grads.of(within), into, piece, last=piece.stop == hidden.shape[0])
