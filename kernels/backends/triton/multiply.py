"""A gradient times a number that the device alone knows, and that is nearly always 1: then nothing is read or written."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels' arguments have no types that mypy knows.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import program_count
from .tile import kernel

BLOCK, WARPS = 4096, 8


@kernel
def multiply_kernel(values, factor, size, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, tl.where(by == 1, first, size), tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(values + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(values + at, (x * by).to(values.dtype.element_ty), mask=at < size)


def multiply_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, a tensor of one element. `values` is contiguous, in at most 32 bits an element."""
    programs = min(triton.cdiv(values.numel(), BLOCK), program_count(values.device))
    if programs > 0:
        multiply_kernel[(programs,)](values, factor, values.numel(), BLOCK=BLOCK, num_warps=WARPS)
