"""Rows whose target is ignored are left out before any work is done."""

from __future__ import annotations

from torch import Tensor


class KeptRows:
    """The rows whose target is not ignored. The others never enter a loop, so that not even a NaN in them does harm."""

    def __init__(self, targets: Tensor, ignore_index: int) -> None:
        self.total = targets.shape[0]
        kept = (targets != ignore_index).nonzero().squeeze(1)
        self.index = None if kept.shape[0] == self.total else kept

    def gather(self, values: Tensor) -> Tensor:
        return values if self.index is None else values.index_select(0, self.index)

    def scatter(self, values: Tensor) -> Tensor:
        """Back to all rows, with 0 in those that are ignored."""
        if self.index is None:
            return values
        return values.new_zeros(self.total, *values.shape[1:]).index_copy_(0, self.index, values)
