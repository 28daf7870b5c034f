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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .backends.interface import Backend, Head, HeadGrads, Needs, RowGrads, TokenStatsOptions
from .token_stats import TokenStats
from .vocab_parallel import VocabSlice


class ChunkLoss(Protocol):
    @property
    def grads(self) -> Sequence[Tensor | None]:
        """Those of what else it differentiates; whole after the last chunk."""
        ...

    def __call__(
        self, stats: TokenStats, tokens: slice, cu_seqlens: Tensor, first: int, differentiate: bool
    ) -> tuple[Tensor, RowGrads | None]:
        """The loss of a chunk's trajectories, [], and if wanted its derivatives with respect to the statistics.

        `stats` carry no gradient, `tokens` are the chunk's among all, `cu_seqlens` its own bounds, from 0 on, and `first` is
        the index of its first trajectory among all.
        """
        ...


@dataclass(frozen=True)
class Plan:
    cu_seqlens: Tensor
    options: TokenStatsOptions
    backend: Backend
    max_chunk_bytes: int | None
    needs: Needs
    differentiate: bool
    """Whether the loss's own derivatives are wanted, as they are for `needs`, but may be without."""
    vocab_slice: VocabSlice | None = None


def single_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, loss_of: ChunkLoss, plan: Plan
) -> tuple[Tensor, TokenStats, tuple[Tensor | None, ...]]:
    """The loss [], the statistics of all tokens, and the gradients of hidden, weight and bias, which are yet to be scaled.

    Those of float16 are in float32: a loss's scale, which keeps them from underflowing, comes with the backward pass alone.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _run(hidden, weight, bias, targets, loss_of, plan)


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, loss_of: ChunkLoss, plan: Plan
) -> tuple[Tensor, TokenStats, tuple[Tensor | None, ...]]:
    options, needs = plan.options, plan.needs
    head = plan.backend.Head(weight, bias, options)
    max_tokens = head.memory.chunk_tokens(hidden.shape[0], plan.max_chunk_bytes, weight_grad=needs.weight)
    if plan.vocab_slice is not None:  # all processes must go through the same chunks
        max_tokens = plan.vocab_slice.fewest(max_tokens)
    into = HeadGrads(hidden, weight, options, needs, scaled_later=True)
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
        part_loss, part, row_grads = _loss_and_gradients(loss_of, plan, local, tokens, relative, first)
        for whole, values in zip(all_stats, part, strict=True):
            if whole is not None and values is not None:
                whole[tokens] = values
        loss += part_loss
        if row_grads is None or not any(needs):
            continue
        if chunk is not None:
            chunk.backward(row_grads, into, tokens, last=tokens.stop == hidden.shape[0])
        else:
            _recompute(head, hidden, targets, options, tokens, row_grads, into, max_tokens)
    return loss, all_stats, into.finish(bias)


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
    loss_of: ChunkLoss, plan: Plan, local: TokenStats, tokens: slice, cu_seqlens: Tensor, first: int
) -> tuple[Tensor, TokenStats, RowGrads | None]:
    """The loss of a chunk, the statistics over the whole vocabulary, and the loss's derivatives by those of this process."""
    if plan.vocab_slice is None:
        loss, grads = loss_of(local, tokens, cu_seqlens, first, plan.differentiate)
        return loss, local, grads
    leaves = detached(local, differentiate=plan.differentiate)
    with torch.set_grad_enabled(plan.differentiate):
        whole = plan.vocab_slice.combine(leaves.logprobs, leaves.lse, leaves.entropy, tokens)
    stats = detached(TokenStats(*whole))
    loss, grads = loss_of(stats, tokens, cu_seqlens, first, plan.differentiate)
    if grads is None:
        return loss, stats, None
    given = [(values, grad) for values, grad in zip(whole, grads, strict=True) if grad is not None]
    inputs = [leaf for leaf in leaves if leaf is not None]
    outputs, upstream = zip(*given, strict=True)
    grad_logprobs, grad_lse, *grad_entropy = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return loss, stats, RowGrads(grad_logprobs, grad_lse, grad_entropy[0] if grad_entropy else None)


def detached(stats: TokenStats, *, differentiate: bool = False) -> TokenStats:
    """The same numbers, as leaves of a new graph if they are to be differentiated."""
    leaves = (None if values is None else values.detach().requires_grad_(differentiate) for values in stats)
    return TokenStats(*leaves)  # type: ignore[arg-type]


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
