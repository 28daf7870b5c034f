"""Attention over a packed batch by torch's FlexAttention, compiled for the GPU at hand: where scores are soft-capped.

Given to transformers models under the name `tbrm_flex`. Nothing is gathered: a prompt's keys are read where they are, and
blocks of tokens that see nothing of each other are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from tbrm.trajectories.packing import FORMS, Run, Segment

FLEX_ATTENTION = "tbrm_flex"
BLOCK = 128
_ANY_DISTANCE = 2**31 - 1


class Forest:
    """Which token of a packed batch sees which, as FlexAttention wants it: a rule for two tokens, and the blocks of
    BLOCK x BLOCK pairs in which it must be asked, or holds for all."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._runs = [run for segment in segments for run in segment.runs()]
        self._device = device
        self._masks: dict[int | None, BlockMask] = {}
        lengths = torch.tensor([run.stop - run.start for run in self._runs])
        bounds = [(len(r.prefix), r.prompt.start, r.prompt.stop, r.start, r.seen - r.start) for r in self._runs]
        *bounds_of_token, shift = torch.tensor(bounds, dtype=torch.int32).repeat_interleave(lengths, dim=0).unbind(1)
        self._position = torch.arange(len(shift), dtype=torch.int32) + shift
        columns = (*bounds_of_token, self._position)
        self._columns = [column.contiguous().to(device, non_blocking=True) for column in columns]

    def within(self, window: int | None) -> BlockMask:
        """Each token's view cut to the `window` tokens of its own path that end in itself. Made once, for all layers."""
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window]

    def _mask(self, window: int | None) -> BlockMask:
        tokens, device = len(self._position), self._device
        asked, whole = (_ordered(blocks, device) for blocks in _blocks(self._runs, self._position, window))
        rule = _rule(self._columns, _ANY_DISTANCE if window is None else window)
        return BlockMask.from_kv_blocks(*asked, *whole, BLOCK, rule, (tokens, tokens))


def _rule(columns: Sequence[Tensor], window: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    prefix_stop, prompt_start, prompt_stop, start, position = columns
    # A tensor: layers with and without a window share one compiled kernel.
    distance = torch.full((), window, dtype=torch.int32, device=position.device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prefix = key < prefix_stop[query]
        in_prompt = (key >= prompt_start[query]) & (key < prompt_stop[query])
        in_run = (key >= start[query]) & (key <= query)
        return (in_prefix | in_prompt | in_run) & (position[query] - position[key] < distance)

    return sees


def _blocks(runs: Sequence[Run], position: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """[blocks, blocks] bool, of queries and keys: those where some pairs may see each other, and those where all do."""
    # Two at least: torch.compile makes a kernel of its own for one.
    count = max(2, -(-len(position) // BLOCK))
    some, every = (torch.zeros(count, count, dtype=torch.bool) for _ in range(2))
    for run in runs:
        for keys in (run.prefix, run.prompt, range(run.start, run.stop)):
            if keys:
                some[_touched(run.start, run.stop), _touched(keys.start, keys.stop)] = True
                every[_filled(run.start, run.stop), _filled(keys.start, keys.stop)] = True
    some, every = some.tril(), every.tril(-1)
    if window is not None:
        padding = (0, count * BLOCK - len(position))
        first = torch.nn.functional.pad(position, padding, value=_ANY_DISTANCE).view(count, BLOCK).amin(1)
        last = torch.nn.functional.pad(position, padding, value=-1).view(count, BLOCK).amax(1)
        some &= first[:, None].long() - last[None, :] < window
        every &= last[:, None].long() - first[None, :] < window
    return some & ~every, every


def _touched(start: int, stop: int) -> slice:
    return slice(start // BLOCK, -(-stop // BLOCK))


def _filled(start: int, stop: int) -> slice:
    return slice(-(-start // BLOCK), stop // BLOCK)


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: these first."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    counts, order = (x.to(torch.int32)[None, None].to(device, non_blocking=True) for x in (blocks.sum(1), order))
    return counts, order


@cache
def _compiled() -> Callable[..., Tensor]:
    # The whole graph or an error: as written it would hold all scores.
    return torch.compile(flex_attention, fullgraph=True)


def _soft_capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def packed_flex_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, value_dim]
    attention_mask: Tensor | None,
    *,
    segments: Forest,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature is that of transformers' attention functions; returns ([1, T, heads, value_dim], None)."""
    if query.dtype is torch.float32:  # rotated in float32, under autocast
        query, key = (x.to(value.dtype) for x in (query, key))
    output = _compiled()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _soft_capped(softcap),
        block_mask=segments.within(sliding_window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"BACKEND": "TRITON"},  # not the one for decoding, which has no gradient
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(FLEX_ATTENTION, packed_flex_attention)
FORMS[FLEX_ATTENTION] = Forest
