"""The keys and values of responses that are being written, and attention to them under the name `tbrm_cached`.

Every response has a row of the cache, and a token's column there is its position. A pass of the model reads one line of
tokens [1, T], of any rows: first the next token of each of the responses, then the prompts of those that are about to begin.
Nothing is padded but the columns of a row that is shorter than others, and nothing is copied from one token to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from tbrm.policy.packed_attention import attend

CACHED_ATTENTION = "tbrm_cached"


class KeyValueCache:
    """[rows, columns, kv_heads, head_dim] keys and values of each layer, in memory that grows with the longest row."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.columns = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for stored in self._layers.values() for x in stored)

    def reserve(self, columns: int) -> None:
        """Makes room for rows of so many tokens."""
        if columns <= self.columns:
            return
        self.columns = max(columns, self.columns * 3 // 2)
        for layer, stored in self._layers.items():
            wider = tuple(self._empty(x) for x in stored)
            for old, new in zip(stored, wider, strict=True):
                new[:, : old.shape[1]] = old
            self._layers[layer] = wider[0], wider[1]

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, for heads like those of `key` and `value` [T, kv_heads, head_dim]."""
        if index not in self._layers:
            # Autocast leaves rotated keys in float32; values are in the precision of the products.
            self._layers[index] = self._empty(key.to(value.dtype)), self._empty(value)
        return self._layers[index]

    def copy(self, sources: list[int], targets: list[int], columns: int) -> None:
        """Copies the first `columns` tokens of rows to other rows."""
        for stored in self._layers.values():
            for x in stored:
                x[targets, :columns] = x[sources, :columns]

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: what is masked must still be finite.
        return like.new_zeros(self.rows, self.columns, *like.shape[-2:])


@dataclass(frozen=True)
class Prompts:
    """The tokens of neighbouring rows that enter together: the same columns of each."""

    first: int
    count: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    def allowed(self, window: int | None, device: torch.device) -> Tensor | None:
        """[length, stop] bool, which columns a token sees; None where it is simply those before and its own."""
        narrow = window is not None and window < self.stop
        if not self.start and not narrow:
            return None
        ones = torch.ones(self.length, self.stop, dtype=torch.bool, device=device)
        seen = ones.tril(self.start)
        return seen.triu(self.start - window + 1) if window is not None else seen


@dataclass
class Reading:
    """What a pass reads: the token at `positions` [R] of the first R rows, then prompts of others."""

    cache: KeyValueCache
    positions: Tensor
    span: int
    """Columns that hold all of the R rows, the tokens of this pass included."""
    prompts: Sequence[Prompts]
    _seen: dict[int | None, Tensor] = field(default_factory=dict)

    def seen(self, window: int | None) -> Tensor:
        """[R, 1, 1, span] bool, which columns of its row each of the R tokens sees; the same for all layers of a kind."""
        if window not in self._seen:
            columns = torch.arange(self.span, device=self.positions.device)
            behind = self.positions[:, None, None, None] - columns
            self._seen[window] = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        return self._seen[window]


def cached_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: Tensor | None,
    *,
    reading: Reading,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature is that of transformers' attention functions; returns ([1, T, heads, head_dim], None)."""
    assert isinstance(module.layer_idx, int)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, head_dim]
    keys, values = reading.cache.layer(module.layer_idx, key, value)
    kv_heads = key.shape[1]
    groups = query.shape[1] // kv_heads
    outputs = []
    at = len(reading.positions)
    if at:
        each = torch.arange(at, device=query.device)
        keys[each, reading.positions] = key[:at].to(keys.dtype)
        values[each, reading.positions] = value[:at]
        # The heads that share keys are so many queries to them: nothing is repeated.
        q = query[:at].reshape(at, kv_heads, groups, -1)
        k, v = (x[:at, : reading.span].transpose(1, 2) for x in (keys, values))
        outputs.append(attend(q, k, v, reading.seen(sliding_window), scaling, softcap).flatten(1, 2))
    for prompts in reading.prompts:
        rows, columns = slice(prompts.first, prompts.first + prompts.count), slice(prompts.start, prompts.stop)
        own = slice(at, at + prompts.count * prompts.length)
        at = own.stop
        q, k, v = (x[own].unflatten(0, (prompts.count, prompts.length)) for x in (query, key, value))
        keys[rows, columns], values[rows, columns] = k, v
        k, v = (x[rows, : prompts.stop].transpose(1, 2).repeat_interleave(groups, dim=1) for x in (keys, values))
        allowed = prompts.allowed(sliding_window, query.device)
        out = attend(q.transpose(1, 2), k, v, allowed, scaling, softcap)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register(CACHED_ATTENTION, cached_attention)
