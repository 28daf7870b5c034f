"""Attention over a packed batch in one kernel: flash-attn's, for variable lengths, on a GPU.

Given to transformers models under the name `tbrm_varlen`. A segment is a tree, and the kernel knows paths only: a run of
queries whose keys end where they do. So a prompt is one sequence, and each response to it another, whose keys are gathered:
the prefix, the prompt, itself. No score across responses is computed, and no mask is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from tbrm.data import Segment

FLASH_ATTENTION = "tbrm_varlen"  # transformers takes names with "flash" in them for its own


@dataclass(frozen=True)
class Paths:
    """S sequences: neighbouring queries of a packed batch, and K keys of the same batch that they see."""

    cu_queries: Tensor  # [S+1] int32
    cu_keys: Tensor  # [S+1] int32
    key_rows: Tensor  # [K] int64
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> Paths:
        queries, keys, rows = [0], [0], []
        for segment in segments:
            # One response continues its prompt; where there are several, the prompt is a sequence of its own.
            starts = segment.branches if len(segment.branches) > 1 else ()
            bounds = [segment.start, *starts, segment.stop]
            seen = [torch.arange(segment.prefix)]
            if starts:
                seen.append(torch.arange(segment.start, starts[0]))
            for number, (start, stop) in enumerate(pairwise(bounds)):
                if start == stop:
                    continue
                path = torch.cat([*(seen if number else seen[:1]), torch.arange(start, stop)])
                rows.append(path)
                queries.append(stop)
                keys.append(keys[-1] + len(path))
        cu_queries, cu_keys = torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32)
        return cls(
            cu_queries.to(device, non_blocking=True),
            cu_keys.to(device, non_blocking=True),
            torch.cat(rows).to(device, non_blocking=True),
            int(cu_queries.diff().max()),
            int(cu_keys.diff().max()),
        )


def flash_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: Tensor | None,
    *,
    segments: Paths,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature is that of transformers' attention functions; returns ([1, T, heads, head_dim], None)."""
    from flash_attn import flash_attn_varlen_func

    if query.dtype is torch.float32:  # rotated in float32, under autocast
        query, key = (x.to(value.dtype) for x in (query, key))
    key, value = (x[0].transpose(0, 1).index_select(0, segments.key_rows) for x in (key, value))
    output = flash_attn_varlen_func(
        query[0].transpose(0, 1),
        key,
        value,
        segments.cu_queries,
        segments.cu_keys,
        segments.most_queries,
        segments.most_keys,
        softmax_scale=scaling,
        causal=True,  # aligned at the ends: the last query of a sequence sees all of its keys
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output[None], None


AttentionInterface.register(FLASH_ATTENTION, flash_attention)
