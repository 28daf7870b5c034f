"""What the single pass says that it will hold, which `tbrm plan` counts with, beside what it holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tbrm_kernels.backends import interface, registry
from tbrm_kernels.backends.head_memory import HeadMemory
from tests.kernels.heads import DEVICE, random_head

T, V, D = 37, 301, 24


def held(head: interface.Head, chunk: interface.Chunk) -> Tensor:
    """The memory of the chunk's logits, wherever the backend has it."""
    scratch = getattr(head, "_scratch", None)
    return scratch if scratch is not None else chunk._logits.kept  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chunk_takes_what_is_said(backend: str, dtype: torch.dtype) -> None:
    inputs = random_head(T, V, D, dtype, bias=False)
    options = interface.TokenStatsOptions(dtype)
    head = registry.select(backend, DEVICE, dtype).Head(inputs.weight, None, options)
    with torch.no_grad():
        chunk = head.chunk(inputs.hidden, inputs.targets.clamp(min=0), options)  # none is ignored
    lanes = -(-T // head.memory.strip) * head.memory.strip
    assert held(head, chunk).nbytes == head.memory.token_bytes * lanes


def test_what_is_asked_for_is_kept_to_and_the_sum_is_traded_for_one_chunk() -> None:
    memory = HeadMemory(token_bytes=10, sum_bytes=2000, usual_bytes=1000, strip=32)
    assert memory.chunk_tokens(500, 10 * 70, weight_grad=True) == 64
    assert memory.chunk_tokens(500, 10 * 7, weight_grad=True) == 7
    assert memory.chunk_tokens(500, 1, weight_grad=True) == 1
    assert memory.chunk_tokens(288, None, weight_grad=True) == 288  # alone: 3000 bytes, in whole strips
    assert memory.chunk_tokens(289, None, weight_grad=True) == 96
    assert memory.chunk_tokens(289, None, weight_grad=False) == 96
    assert memory.chunk_tokens(96, None, weight_grad=False) == 96
