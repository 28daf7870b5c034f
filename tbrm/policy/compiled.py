"""torch.compile of what stands around each block's attention: norms and MLP.

Attention goes segment by segment, and a graph of it would be made anew for every number of segments. Norms and MLP see a
row of tokens, of which one graph takes any length.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import nn

_as_written: ContextVar[bool] = ContextVar("as_written", default=False)


def compile_around_attention(blocks: Iterable[nn.Module]) -> None:
    """Compiles the children of transformer blocks in place, but for those that take an attention mask.

    Raises ValueError without a C++ compiler, which torch.compile needs, for a GPU too.
    """
    compiler = os.environ.get("CXX", "g++")  # as torch.compile has it
    if shutil.which(compiler) is None:
        raise ValueError(f"model.compile: true, but there is no {compiler}: install one, or name yours by CXX")
    for block in blocks:
        for child in block.children():
            if "attention_mask" not in inspect.signature(child.forward).parameters:
                kind: Any = type(child)
                child.__class__ = _compiled(kind)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Runs the modules as they are written, in this thread: generation, token by token, would need graphs of its own."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


@cache
def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """The same kind of module with a compiled forward, whose graphs all modules of the kind share: those of all blocks, and of
    the reference. A forward set on each module would, in a deep copy, still run with the weights of the original."""
    written: Any = kind.forward
    compiled = torch.compile(written, dynamic=True)

    def forward(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        return (written if _as_written.get() else compiled)(self, *inputs, **options)

    return type(kind.__name__, (kind,), {"forward": forward})
