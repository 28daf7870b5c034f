"""The floor of a training step: the matrix products that it ran, bare, and its optimiser's traffic with memory.

`Products` watches a step and keeps the shapes of all products: the model's, those inside attention and inside the head. `floor`
times each of these shapes by itself, in the dtype that it had, and a copy of as many bytes as clipping and AdamW must move.
What a step takes beyond that is all that is no product: norms, rotations, activations, softmaxes, casts, copies, Python.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = 0.2  # of repeats of one shape
STATE_PASSES = 1 + 4 + 3
"""Reads and writes of the parameters' size that clipping and AdamW cannot do without: the gradients read for their norm; then
parameter, gradient and both moments read, and parameter and both moments written."""


class Product(NamedTuple):
    """[batch, m, k] @ [batch, k, n]."""

    batch: int
    m: int
    k: int
    n: int
    dtype: torch.dtype

    @property
    def operations(self) -> float:
        return 2.0 * self.batch * self.m * self.k * self.n


class Products(TorchDispatchMode):
    """Counts the products of all that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()
        self.unknown: Counter[str] = Counter()
        """Operators whose names speak of products, and of which nothing is known here: the floor would be too low."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if (found := _OPERATORS.get(name)) is not None:
            self.counts.update(found(*args))
        elif any(part in name for part in ("mm", "matmul", "attention", "linear", "einsum", "conv", "head_")):
            self.unknown[name] += 1
        return func(*args, **(kwargs or {}))


def _mm(a: Tensor, b: Tensor) -> list[Product]:
    batch = a.shape[0] if a.dim() == 3 else 1
    return [Product(batch, a.shape[-2], a.shape[-1], b.shape[-1], a.dtype)]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> list[Product]:
    """Scores and their product with the values."""
    batch, queries, keys = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    return [
        Product(batch, queries, q.shape[3], keys, q.dtype),
        Product(batch, queries, keys, v.shape[3], q.dtype),
    ]


def _attention_backward(q: Tensor, k: Tensor, v: Tensor) -> list[Product]:
    """Scores once more, and the gradients of probabilities, values, queries and keys."""
    batch, queries, keys = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    width, of_values = q.shape[3], v.shape[3]
    return [
        Product(batch, queries, width, keys, q.dtype),
        Product(batch, queries, of_values, keys, q.dtype),
        Product(batch, keys, queries, of_values, q.dtype),
        Product(batch, queries, keys, width, q.dtype),
        Product(batch, keys, queries, width, q.dtype),
    ]


def _head_backward(hidden: Tensor, grad_weight: Tensor | None) -> list[Product]:
    return [] if grad_weight is None else [Product(1, len(grad_weight), *hidden.shape, hidden.dtype)]


_OPERATORS: dict[str, Callable[..., list[Product]]] = {
    "mm": lambda a, b, *_: _mm(a, b),
    "bmm": lambda a, b, *_: _mm(a, b),
    "addmm": lambda _, a, b, *__: _mm(a, b),
    "baddbmm": lambda _, a, b, *__: _mm(a, b),
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_: _attention(q, k, v),
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda _, q, k, v, *__: _attention_backward(q, k, v),
    # The CPU kernels of csrc/head.cpp.
    "head_forward": lambda hidden, weight, *_: _mm(hidden.to(weight.dtype), weight.T),
    "head_backward": lambda *args: _head_backward(hidden=args[11], grad_weight=args[12]),
    "head_hidden_gradient": lambda _, weight, tokens: [Product(1, tokens, *weight.shape, weight.dtype)],
}


class Floor(NamedTuple):
    seconds_of_floor: float
    products: float
    """Seconds of these alone."""
    operations: float
    of_optimiser: float


def floor(products: Products, parameters: int) -> Floor:
    """Of one step, on this machine as it is now."""
    seconds = sum(count * _seconds_of(product) for product, count in products.counts.items())
    source, target = torch.ones(2, parameters)
    of_copy = _median(lambda: target.copy_(source)) / 2  # it reads once and writes once
    of_optimiser = STATE_PASSES * of_copy
    operations = sum(count * product.operations for product, count in products.counts.items())
    return Floor(seconds + of_optimiser, seconds, operations, of_optimiser)


def _seconds_of(product: Product) -> float:
    a = torch.randn(product.batch, product.m, product.k).to(product.dtype)
    b = torch.randn(product.batch, product.k, product.n).to(product.dtype)
    if product.batch > 1:
        return _median(lambda: torch.bmm(a, b))
    return _median(lambda: torch.mm(a[0], b[0]))


def _median(run: Callable[[], object]) -> float:
    run()
    taken: list[float] = []
    while sum(taken) < SECONDS or len(taken) < 3:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return median(taken)
