"""Attention over a packed batch in one kernel for sequences of any lengths, on a GPU: flash-attn's, or the one in torch.

Given to transformers models under the names `tbrm_varlen` and `tbrm_torch_varlen`. A segment is a tree, and the kernel knows
paths only: a run of queries whose keys end where they do. So a prompt is one sequence, and each response to it another, whose
keys are gathered: the prefix, the prompt, itself. No score across responses is computed, and no mask is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

from tbrm.trajectories.packing import FORMS, Run, Segment

FLASH_ATTENTION = "tbrm_varlen"  # transformers takes names with "flash" in them for its own
VARLEN_ATTENTION = "tbrm_torch_varlen"


@dataclass(frozen=True)
class Paths:
    """S sequences: neighbouring queries of a packed batch, and K keys of the same batch that they see."""

    cu_queries: Tensor  # [S+1] int32
    cu_keys: Tensor  # [S+1] int32
    key_rows: Tensor | None
    """[K] int64; None where nothing is shared, and each sequence's keys are its own tokens."""
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> Paths:
        runs = [run for segment in segments for run in segment.runs()]
        queries = [run.stop - run.start for run in runs]
        keys = [run.seen + length for run, length in zip(runs, queries, strict=True)]
        rows = None
        if keys != queries:
            paths = [torch.arange(part.start, part.stop) for run in runs for part in _path(run)]
            rows = torch.cat(paths).to(device, non_blocking=True)
        cu_queries, cu_keys = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
            for lengths in (queries, keys)
        )
        return cls(cu_queries, cu_keys, rows, max(queries), max(keys))


def _path(run: Run) -> tuple[range, range, range]:
    return run.prefix, run.prompt, range(run.start, run.stop)


class _Gather(torch.autograd.Function):
    """Rows of keys or values, of which a prompt's are taken once for each response. Their gradients are added up in float32: a
    GPU's index_add would round after each."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = source.shape
        return source.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (rows,) = grads, ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.shape, dtype=wide).index_add_(0, rows, grad.to(wide))
        return total.to(grad.dtype), None


def _attend(
    kernel: Callable[..., Tensor],
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, value_dim]
    paths: Paths,
    scaling: float | None,
    sliding_window: int | None,
) -> tuple[Tensor, None]:
    """kernel: as `varlen_attn`, of [., heads, width]; a sequence's last query sees the last of its keys."""
    if query.dtype is torch.float32:  # rotated in float32, under autocast
        query, key = (x.to(value.dtype) for x in (query, key))
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    width = -(-max(head_dim, value_dim) // 8) * 8  # the kernels have one, a multiple of 8; zeros add nothing to a score
    q, k, v = (_widened(x[0].transpose(0, 1), width) for x in (query, key, value))
    if paths.key_rows is not None:
        k, v = _Gather.apply(k, paths.key_rows), _Gather.apply(v, paths.key_rows)
    lengths = (paths.cu_queries, paths.cu_keys, paths.most_queries, paths.most_keys)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = kernel(q, k, v, *lengths, window_size=window, scale=head_dim**-0.5 if scaling is None else scaling)
    return output[None, ..., :value_dim], None


def _widened(rows: Tensor, width: int) -> Tensor:
    return rows if rows.shape[-1] == width else pad(rows, (0, width - rows.shape[-1]))


def flash_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, value_dim]
    attention_mask: Tensor | None,
    *,
    segments: Paths,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature is that of transformers' attention functions; returns ([1, T, heads, value_dim], None)."""
    from flash_attn import flash_attn_varlen_func

    def kernel(*inputs: Any, window_size: tuple[int, int], scale: float) -> Tensor:
        output: Tensor = flash_attn_varlen_func(
            *inputs,
            softmax_scale=scale,
            causal=True,
            window_size=window_size,
            softcap=softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return output

    return _attend(kernel, query, key, value, segments, scaling, sliding_window)


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, value_dim]
    attention_mask: Tensor | None,
    *,
    segments: Paths,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `flash_attention`, by the copy of flash-attn 2 that torch is built with. Deterministic where torch is told to be."""
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None:
        raise ValueError("torch's varlen_attn does not soft-cap scores: set model.attention to auto")
    # Grouped heads are taken as they are by torch 2.11, and from 2.12 on where one says so.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    kernel: Any = partial(varlen_attn, **grouped)  # whose type allows for auxiliary outputs
    return _attend(kernel, query, key, value, segments, scaling, sliding_window)


AttentionInterface.register(FLASH_ATTENTION, flash_attention)
AttentionInterface.register(VARLEN_ATTENTION, varlen_attention)
FORMS[FLASH_ATTENTION] = FORMS[VARLEN_ATTENTION] = Paths.of
