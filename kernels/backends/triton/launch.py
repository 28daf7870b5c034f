"""How the tiled kernels are launched: their operands, and a few launch configurations per architecture."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.tools.tensor_descriptor import TensorDescriptor

from ..head_memory import ALIGNMENT
from ..interface import TokenStatsOptions

INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class TileConfig:
    block_t: int
    block_v: int
    block_d: int
    warps: int
    stages: int
    flatten: bool = False
    """Of a program's tiles: the next one's operands are fetched while the last one's exponentials are taken."""


INTERPRETER_CONFIG = TileConfig(32, 64, 64, 1, 1)
"""Small, so that the tests' small problems have several tiles."""

# By the major compute capability; the first is taken unless TBRM_AUTOTUNE is set. bench/results/triton_aot.md shows what each
# compiles to: none spills registers.
CONFIGS: dict[tuple[int, torch.dtype], tuple[TileConfig, ...]] = {
    (8, torch.bfloat16): (TileConfig(128, 128, 64, 8, 3), TileConfig(128, 64, 64, 4, 4)),
    (9, torch.bfloat16): (TileConfig(128, 128, 64, 8, 4), TileConfig(128, 64, 64, 4, 4), TileConfig(64, 128, 64, 4, 4)),
    (10, torch.bfloat16): (
        TileConfig(128, 128, 64, 8, 4),
        TileConfig(128, 64, 64, 4, 4),
        TileConfig(64, 128, 64, 4, 4),
    ),
    (8, torch.float32): (TileConfig(64, 64, 32, 4, 3),),
    (9, torch.float32): (TileConfig(64, 64, 32, 4, 3),),
    (10, torch.float32): (TileConfig(64, 64, 32, 4, 2),),
}

# Taken first where nothing is asked for but log-probs and lse of plain logits: that leaves registers for a tile that fetches
# a quarter less from the cache per product.
WIDE_CONFIGS: dict[tuple[int, torch.dtype], tuple[TileConfig, ...]] = {
    (9, torch.bfloat16): (TileConfig(256, 128, 64, 8, 3),),
}


# Of the kernels that take exponentials relative to a known number, in bfloat16: by capability, and whether nothing but
# log-probs and lse of plain logits is asked for. That for 9.0 was measured on an H100 (bench/results/gpu).
EXP_CONFIGS: dict[tuple[int, bool], TileConfig] = {
    (8, True): TileConfig(128, 128, 64, 8, 3),
    (8, False): TileConfig(128, 128, 64, 8, 3),
    (9, True): TileConfig(128, 256, 64, 8, 3, flatten=True),
    (9, False): TileConfig(128, 128, 64, 8, 3, flatten=True),
    (10, True): TileConfig(128, 128, 64, 8, 4, flatten=True),
    (10, False): TileConfig(128, 64, 64, 4, 3, flatten=True),
}


class Arguments(NamedTuple):
    tensors: tuple[Any, Any, Tensor | None, Tensor | None]
    """hidden, weight, bias and 1 / temperature; the matrices as descriptors where the GPU has a unit (TMA) that loads blocks by
    them."""
    sizes: tuple[int, ...]
    """T, V, D and the strides of hidden and weight."""
    constants: dict[str, Any]


class Scaling(NamedTuple):
    """From products to Q, as `tile.scale` has it, and back."""

    inner: float
    outer: float
    factor: float  # dQ / dproducts, but for the slope of the soft-capping
    inverse_temperature: Tensor | None
    """[T], by which Q, `outer` and `factor` are still to be multiplied; None where they have the one temperature in them."""


class Operands:
    """Hidden, weight and bias, as the tiled kernels take them."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: TokenStatsOptions) -> None:
        self.hidden = aligned(hidden.to(options.operand_dtype))
        self.weight = aligned(weight.to(options.operand_dtype))
        self.bias = None if bias is None else bias.contiguous()
        self.options = options
        self.scaling = scaling(options)
        plain_scaling = options.softcap is None and self.scaling.inverse_temperature is None
        self.plain = bias is None and plain_scaling and not options.entropy

    def arguments(self, config: TileConfig) -> Arguments:
        (T, D), V = self.hidden.shape, len(self.weight)
        vectors = (self.bias, self.scaling.inverse_temperature)
        tensors: tuple[Any, Any, Tensor | None, Tensor | None] = (self.hidden, self.weight, *vectors)
        if has_tma(self.hidden.device):
            hidden = TensorDescriptor.from_tensor(self.hidden, [config.block_t, config.block_d])
            weight = TensorDescriptor.from_tensor(self.weight, [config.block_v, config.block_d])
            tensors = (hidden, weight, *vectors)
        constants = {
            "CAPPED": self.options.softcap is not None,
            "FACTOR": tl.bfloat16 if self.hidden.dtype == torch.bfloat16 and not INTERPRETED else tl.float32,
            "BLOCK_T": config.block_t,
            "BLOCK_V": config.block_v,
            "BLOCK_D": config.block_d,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
        return Arguments(tensors, (T, V, D, self.hidden.stride(0), self.weight.stride(0)), constants)


def has_tma(device: torch.device) -> bool:
    return device.type != "cuda" or _major(device) >= 9


def aligned(matrix: Tensor) -> Tensor:
    """The matrix, or where its layout stands in the way of wide loads a copy, with columns of zeros if need be."""
    n_rows, width = matrix.shape
    pitch = triton.cdiv(width, ALIGNMENT) * ALIGNMENT
    fits = matrix.data_ptr() % ALIGNMENT == 0 and matrix.stride(1) == 1 and matrix.stride(0) % ALIGNMENT == 0
    if fits and pitch == width:
        return matrix
    copy = matrix.new_zeros(n_rows, pitch)
    copy[:, :width] = matrix
    return copy


def scaling(options: TokenStatsOptions) -> Scaling:
    temperature, inverse = options.temperature, None
    if isinstance(temperature, Tensor):
        inverse, temperature = temperature.reciprocal(), 1.0
    factor = options.logit_scale / temperature
    if options.softcap is None:
        return Scaling(factor, 1.0, factor, inverse)
    return Scaling(options.logit_scale / options.softcap, options.softcap / temperature, factor, inverse)


def candidates(operands: Operands) -> tuple[TileConfig, ...]:
    device, dtype = operands.hidden.device, operands.hidden.dtype
    if device.type != "cuda":
        return (INTERPRETER_CONFIG,)
    # What is newer than the table is taken for 8.x: consumer Blackwell, 12.x, has no tcgen05 and as little shared memory.
    major = _major(device)
    key = (major if (major, dtype) in CONFIGS else 8, dtype)
    wide = WIDE_CONFIGS.get(key, ()) if operands.plain and len(operands.hidden) > 128 else ()
    return wide + CONFIGS[key]


def exp_config(operands: Operands, *, keep: bool) -> TileConfig:
    device = operands.hidden.device
    if device.type != "cuda":
        return INTERPRETER_CONFIG
    major = _major(device)
    return of_exps(EXP_CONFIGS[major if (major, True) in EXP_CONFIGS else 8, operands.plain], keep=keep)


def of_exps(config: TileConfig, *, keep: bool) -> TileConfig:
    """Where no tile is written, there is shared memory for one stage more."""
    return config if keep else replace(config, stages=config.stages + 1)


def multiprocessors(device: torch.device) -> int:
    return _properties(device).multi_processor_count if device.type == "cuda" else 3


@cache
def _properties(device: torch.device) -> Any:
    """Asked once: each launch needs them, and torch takes its time."""
    return torch.cuda.get_device_properties(device)


def _major(device: torch.device) -> int:
    return int(_properties(device).major)


def program_count(device: torch.device) -> int:
    """How many programs keep the device busy: some waves of them, so that the last one costs little."""
    return 8 * multiprocessors(device) if device.type == "cuda" else 3


def choose_config(operands: Operands, run: Callable[[TileConfig], object]) -> TileConfig:
    """The default configuration, or with TBRM_AUTOTUNE=1 the fastest at `run`, timed once per GPU, dtype and head."""
    choices = candidates(operands)
    if len(choices) == 1 or os.environ.get("TBRM_AUTOTUNE", "0") in ("", "0"):
        return choices[0]
    weight = operands.weight
    key = repr((torch.cuda.get_device_name(weight.device), weight.dtype, tuple(weight.shape), choices))
    if key not in _TUNED:
        folder = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        if (known := folder.get_file("fastest.json")) is None:
            milliseconds = {i: triton.testing.do_bench(partial(run, config)) for i, config in enumerate(choices)}
            known = folder.put(
                json.dumps(min(milliseconds, key=milliseconds.__getitem__)), "fastest.json", binary=False
            )
        _TUNED[key] = choices[json.loads(Path(known).read_text())]
    return _TUNED[key]


_TUNED: dict[str, TileConfig] = {}  # what this process has found or read
