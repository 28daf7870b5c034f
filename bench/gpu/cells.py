"""What `bench.gpu.head` measures, in the order in which it does: what is ours first, what takes long to compile last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.problem import Problem
from bench.shapes import DEVICE
from bench.ways import FLOOR, ONE_PRODUCT, SCORING, step_of

FLOAT32_FLOOR = "floor, weight's gradient in float32"
"""As the three products, with the last in float32, which is what a sum over chunks takes."""

LIGER_MEAN = "Liger-Kernel, mean cross-entropy"
"""Its kernel for supervised training, whose loss is a sum over tokens: no trajectory's, but what it is known for."""


class Head(NamedTuple):
    name: str
    vocab: int
    width: int


HEADS = (Head("0.5B", 151936, 896), Head("8B", 128256, 4096), Head("32B", 151936, 5120))
TINY = (Head("tiny", 777, 80),)
TOKENS, TINY_TOKENS = 8192, 32


class Cell(NamedTuple):
    what: str  # time or errors
    head: Head
    way: str


def cells(heads: tuple[Head, ...]) -> Iterator[Cell]:
    single, recompute = "tbrm: single pass", "tbrm: recompute"
    for what, ways in (
        ("time", (single, SCORING, recompute, FLOOR, FLOAT32_FLOOR)),
        ("errors", (single, recompute)),
        ("time", ("Liger-Kernel", LIGER_MEAN, "cut-cross-entropy")),
        ("errors", ("Liger-Kernel", "cut-cross-entropy", "torch, eager")),
        ("time", ("torch, eager",)),
        ("time", ("torch.compile",)),
    ):
        for head in heads:
            yield from (Cell(what, head, way) for way in ways)


def liger_mean(problem: Problem) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(problem.hidden, problem.weight, problem.targets)[0]


def step(way: str, problem: Problem) -> Callable[[], object]:
    """What is timed."""
    if way == LIGER_MEAN:
        return lambda: liger_mean(problem).backward()
    if way == FLOAT32_FLOOR:
        return lambda: three_products(problem)
    return step_of(way, problem)


@torch.no_grad()
def three_products(problem: Problem) -> None:
    hidden, weight = problem.hidden, problem.weight
    logits = hidden @ weight.T
    logits @ weight
    if DEVICE.type == "cuda":
        torch.mm(logits.T, hidden, out_dtype=torch.float32)
    else:  # where torch has no such product
        torch.mm(logits.T.float(), hidden.float())


def floor_of(way: str) -> str:
    return ONE_PRODUCT if way == SCORING else FLOOR


def operations(cell: Cell, tokens: int) -> float:
    """Of the bare products that a way is compared with, so that all ways have one scale."""
    return (2 if cell.way == SCORING else 6) * tokens * cell.head.vocab * cell.head.width
