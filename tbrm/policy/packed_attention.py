"""Attention over a packed batch, given to transformers models under the name `tbrm_packed`.

Each segment of the batch attends within itself, so the cost is that of the segments and no [T, T] mask exists.
Works on any device; sliding windows (Gemma, Mistral) and score soft-capping (Gemma 2) are honoured.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tbrm.trajectories.packing import FORMS, Segment

PACKED_ATTENTION = "tbrm_packed"


class Tree(NamedTuple):
    """A segment of a packed batch, of L tokens and a prefix, and what its tokens see."""

    segment: Segment
    allowed: Tensor | None
    """[L, prefix + L] bool, whether query i may see key j; None where that is simply j <= i."""

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> list[Tree]:
        masks = (_tree_mask(s) if s.prefix or len(s.branches) > 1 else None for s in segments)
        return [
            cls(segment, None if mask is None else mask.to(device, non_blocking=True))
            for segment, mask in zip(segments, masks, strict=True)
        ]


def _tree_mask(segment: Segment) -> Tensor:
    """Token i sees the prefix, and token j if that is not later and is in the prompt (branch 0) or in the same response."""
    bounds = [segment.start, *segment.branches, segment.stop]
    branch = torch.arange(len(bounds) - 1).repeat_interleave(
        torch.tensor(bounds).diff(), output_size=bounds[-1] - bounds[0]
    )
    own = ((branch[None, :] == 0) | (branch[None, :] == branch[:, None])).tril()
    return torch.cat([torch.ones(len(branch), segment.prefix, dtype=torch.bool), own], dim=1)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Tree],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature is that of transformers' attention functions; returns ([1, T, heads, head_dim], None)."""
    if query.device.type == "cpu":
        key, value = key.to(query.dtype), value.to(query.dtype)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # Split, not sliced: the gradient of a slice is as long as the batch, and there are as many slices as segments.
    lengths = [segment.stop - segment.start for segment, _ in segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs = []
    for (segment, allowed), q, k, v in zip(segments, queries, keys, values, strict=True):
        if segment.prefix:  # it is the first segment
            k, v = torch.cat([keys[0], k], dim=2), torch.cat([values[0], v], dim=2)
        if sliding_window is not None and sliding_window < k.shape[2]:
            allowed = _within_window(segment, allowed, sliding_window, query.device)
        with _precise(query.device):
            outputs.append(attend(q, k, v, allowed, scaling, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _precise(device: torch.device) -> AbstractContextManager[object]:
    """On the CPU, products in the type of the queries, which are float32 under autocast too, once rotated: torch takes several
    times as long for the gradients of short segments in bfloat16."""
    return torch.autocast("cpu", enabled=False) if device.type == "cpu" else nullcontext()


def _within_window(segment: Segment, allowed: Tensor | None, window: int, device: torch.device) -> Tensor:
    """The segment's mask, each token's view cut to the `window` tokens of its own path that end in itself."""
    length = segment.stop - segment.start
    if allowed is None:
        allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    # The position of a token on its own path is the number of tokens it sees, less one; the prefix has the first ones.
    position = allowed.sum(1) - 1
    key_position = torch.cat([torch.arange(segment.prefix, device=device), position])
    return allowed & (position[:, None] - key_position[None, :] < window)


def attend(
    query: Tensor,  # [batch, heads, queries, head_dim]
    key: Tensor,  # [batch, heads, keys, head_dim]
    value: Tensor,  # [batch, heads, keys, head_dim]
    allowed: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention to what is allowed (bool, broadcast over scores [batch, heads, queries, keys]), or to earlier tokens."""
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, is_causal=allowed is None, scale=scaling
        )
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if allowed is None:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
FORMS[PACKED_ATTENTION] = Tree.of
