"""Choosing the next token of many responses at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 128  # divides the vocabulary of nearly every model


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [R] of logits [R, V], and their logits; NaN where a row has one."""
    values, indices = logits.max(dim=-1)
    return indices, values


def draw(
    logits: Tensor,  # [R, V]
    temperature: float,
    uniforms: Tensor,  # [R] float64, in [0, 1)
) -> tuple[Tensor, Tensor]:
    """Tokens [R] drawn from softmax(logits / temperature), each by one uniform number, and their log-probs [R] float32.

    The inverse of the cumulative distribution, found in two steps: in which block of the vocabulary, then where in it. So
    the vocabulary is gone through once, and only the sums of blocks and a single block are summed up, in float64. Float32
    logits are overwritten. Of a row that has NaN or inf the log-prob is NaN, and the token any.
    """
    scores = logits.float().div_(temperature)
    vocabulary = logits.shape[1]
    exps = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
    if missing := -vocabulary % _BLOCK:
        exps = pad(exps, (0, missing))
    exps = exps.unflatten(1, (-1, _BLOCK))
    sums = exps.sum(dim=-1)
    cumulative = sums.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    block, rest = _invert(cumulative, uniforms[:, None] * total)
    within = exps.take_along_dim(block[:, :, None], dim=1)[:, 0]
    # What is left of the number, as a share of the block: it was summed in float32, the block now is in float64.
    share = rest / sums.gather(1, block)
    cumulative = within.cumsum(dim=-1, dtype=torch.float64)
    place, _ = _invert(cumulative, share.clamp(max=1 - 2**-53) * cumulative[:, -1:])
    logprobs = (within.gather(1, place) / total).log()
    return (block * _BLOCK + place)[:, 0].clamp(max=vocabulary - 1), logprobs[:, 0].float()


def _invert(cumulative: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The first entries of `cumulative` [R, n] above `targets` [R, 1], and how far the targets are above the ones before."""
    index = torch.searchsorted(cumulative, targets, right=True).clamp(max=cumulative.shape[1] - 1)
    before = pad(cumulative, (1, 0)).gather(1, index)
    return index, targets - before
