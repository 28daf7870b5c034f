"""A head whose vocabulary is divided over processes: each holds some rows of the weight, and nobody holds them all.

Every process of the group has the same hidden [T, D] and targets [T], and a slice [V_r, D] of the weight, in the order of
ranks. It computes the statistics of its slice; those of the whole follow from [T] vectors, gathered in one collective:

    lse      = log sum_r e^(lse_r)
    logprobs = Q_target - lse, with Q_target from the process that holds the target
    entropy  = sum_r w_r (entropy_r - log w_r), with the slice's share of probability w_r = e^(lse_r - lse)

Every process sums in the order of ranks: a token's statistics do not depend on which others it is in a chunk with, as the
order of a reduction by the collective might. A slice must hold at least one entry that its bias does not mask with -inf.

Backward, the derivatives of the whole give those of the slice without a collective; only hidden's gradient, to which every
slice adds its part, is summed over the processes, in float32.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends.interface import TokenStatsOptions

_IGNORED = -1


class VocabSlice:
    """This process's part of the vocabulary, and the targets [T] as it sees them."""

    def __init__(self, weight: Tensor, targets: Tensor, ignore_index: int, group: dist.ProcessGroup) -> None:
        self.group = group
        sizes = _everybodys(len(weight), targets.device, group)
        self.vocab = sum(sizes)
        first = sum(sizes[: dist.get_rank(group)])
        self.kept = targets != ignore_index
        self.owned = (targets >= first) & (targets < first + len(weight)) & self.kept
        # Where the target is another's, any entry will do: what is said of it is not used.
        self.targets = torch.where(self.owned, targets - first, 0).where(self.kept, _IGNORED)

    def inputs(self, hidden: Tensor, options: TokenStatsOptions) -> tuple[Tensor, Tensor, TokenStatsOptions]:
        """hidden, whose gradient will be the sum of the slices', targets and options as a head of the slice takes them: an
        ignore_index that is some token's id would be another token's here."""
        return sum_gradient(hidden, self.group), self.targets, replace(options, ignore_index=_IGNORED)

    def fewest(self, number: int) -> int:
        """The smallest of the numbers that the processes give."""
        return min(_everybodys(number, self.targets.device, self.group))

    def combine(
        self, logprobs: Tensor, lse: Tensor, entropy: Tensor | None, tokens: slice | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The statistics over the whole vocabulary from those over this slice, of the given tokens (all if None)."""
        tokens = tokens or slice(None)
        return _Combine.apply(logprobs, lse, entropy, self.owned[tokens], self.kept[tokens], self.group)


def _everybodys(number: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """The number of each process, in the order of ranks: a tensor of one entry takes one collective, an object two."""
    numbers = torch.full((dist.get_world_size(group),), number, device=device)
    dist.all_gather(list(numbers.split(1)), numbers[:1].clone(), group=group)
    return numbers.tolist()


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        lse: Tensor,
        entropy: Tensor | None,
        owned: Tensor,
        kept: Tensor,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        mine = [lse, torch.where(owned, logprobs + lse, 0), *([] if entropy is None else [entropy])]
        slices = lse.new_empty(dist.get_world_size(group), len(mine), len(lse))
        dist.all_gather(list(slices), torch.stack(mine), group=group)
        lses, at_target, *entropies = slices.unbind(1)
        top = lses.amax(0)
        shares = (lses - top).exp()  # of the largest slice's probability
        total, target = reduce(torch.add, shares), reduce(torch.add, at_target)
        log_total = total.log()
        whole_lse = top + log_total
        whole_logprobs = torch.where(kept, (target - top) - log_total, 0)
        whole_entropy = None
        if entropies:
            # A slice of no probability has no say, whatever its own entropy.
            parts = torch.where(shares == 0, 0, shares * (entropies[0] - (lses - top)))
            whole_entropy = torch.where(kept, log_total + reduce(torch.add, parts) / total, 0)
        share = shares[dist.get_rank(group)] / total
        ctx.save_for_backward(share, entropy, whole_entropy, owned, kept)
        ctx.set_materialize_grads(False)
        return whole_logprobs, torch.where(kept, whole_lse, 0), whole_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        share, entropy, whole_entropy, owned, kept = ctx.saved_tensors
        to_logprobs, to_lse, to_entropy = (None if g is None else torch.where(kept, g, 0) for g in grads)
        grad_logprobs = torch.zeros_like(share) if to_logprobs is None else to_logprobs * owned
        grad_lse = grad_logprobs.clone()
        for grad, sign in ((to_lse, 1), (to_logprobs, -1)):
            if grad is not None:
                grad_lse += sign * share * grad
        grad_entropy = None
        if to_entropy is not None and entropy is not None:
            grad_entropy = share * to_entropy
            by_share = torch.where(share == 0, 0, entropy - share.log() - whole_entropy)
            grad_lse += grad_entropy * by_share
        return grad_logprobs, grad_lse, grad_entropy, None, None, None


def sum_gradient(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`values` themselves, whose gradient will be the sum of those of the processes."""
    return _SumGradient.apply(values, group)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None
