"""Weights laid out for many small products on the CPU.

oneDNN multiplies blocks of a weight in an order of its own, and MKL copies them into one. With as few tokens as a pass of
generation has, putting every weight into that order again for each product takes as long as the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_ops = torch.ops.mkldnn


@contextmanager
def packed_weights(lm: nn.Module, precision: torch.dtype) -> Iterator[None]:
    """Within it the linear layers of `lm`, the head included, multiply in `precision` with copies of their weights that
    are laid out once. Where oneDNN cannot, nothing changes."""
    swapped: list[tuple[nn.Module, str, nn.Linear]] = []
    if _can_pack(lm, precision):
        for parent in list(lm.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    swapped.append((parent, name, child))
                    setattr(parent, name, _PackedLinear(child, precision))
    try:
        yield
    finally:
        for parent, name, linear in swapped:
            setattr(parent, name, linear)


def _can_pack(lm: nn.Module, precision: torch.dtype) -> bool:
    if next(lm.parameters()).device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return precision is torch.float32 or (precision is torch.bfloat16 and _ops._is_mkldnn_bf16_supported())


class _PackedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, precision: torch.dtype) -> None:
        super().__init__()
        self.weight = linear.weight
        self.precision = precision
        self._packed: Tensor = _ops._reorder_linear_weight(linear.weight.detach().to(precision))
        self._bias = None if linear.bias is None else linear.bias.detach().to(precision)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _ops._linear_pointwise(x.to(self.precision), self._packed, self._bias, "none", [], "")
        return out
