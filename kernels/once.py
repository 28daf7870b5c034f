"""How an operation that is differentiable once says so, in eager mode and through `torch.func` alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FirstDerivative(torch.autograd.Function):
    """`compute(*tensors)`, of which no derivative can be taken: to ask for one is an error, where torch's own
    `once_differentiable` lets it pass as 0 if the upstream gradient is a constant, or in nested `torch.func.grad`."""

    @staticmethod
    def forward(
        compute: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass  # nothing is kept

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise RuntimeError("tbrm_kernels: a second derivative of the head was asked for: it is once_differentiable")
