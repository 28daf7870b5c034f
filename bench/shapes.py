"""Which shapes are measured: all, or those that the environment variable SHAPES names, as in "32768x1024 49152x256"."""

from __future__ import annotations

import itertools
import os

import torch

VOCABULARIES = (32768, 49152, 151936, 262144)
TOKENS = (256, 1024, 4096)
DEVICE = torch.device(os.environ.get("BENCH_DEVICE", "cpu"))
"""Where everything is computed; `make bench-gpu` says "cuda"."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shapes() -> list[tuple[int, int]]:
    """(V, T) of each problem."""
    named = os.environ.get("SHAPES", "").split()
    if not named:
        return list(itertools.product(VOCABULARIES, TOKENS))
    return [(int(vocab), int(tokens)) for vocab, tokens in (name.split("x") for name in named)]
