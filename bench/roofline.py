"""How fast the Triton backend can be: bytes and operations counted from its tile plan, against data-sheet rates.

    make roofline

Nothing here is measured. Per kernel: the operations of the tensor cores, the exponentials (which a unit of their own
computes), what must pass through DRAM and what the tiles fetch from the second-level cache; the time that each takes at its
rate; and the largest of these as a share of what the kernel takes at best, when its parts overlap as far as they can.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch

from tbrm_kernels.backends.head_memory import CHUNK_BYTES_PER_VOCABULARY_ENTRY
from tbrm_kernels.backends.triton import exps, head, launch

T = 8192
TRAJECTORIES = 32
BF16, F32, INT64 = 2, 4, 8


@dataclass(frozen=True)
class Gpu:
    name: str
    major: int
    tensor: float  # dense bfloat16 operations per second
    dram: float  # bytes per second
    sms: int
    hertz: float  # the boost clock
    exps_per_clock: int = 16  # per multiprocessor: the special-function rate of NVIDIA's programming guide


# NVIDIA's data sheets of H100 SXM and HGX B200 (an eighth of the latter's eight GPUs).
GPUS = (
    Gpu("H100 SXM", 9, 989e12, 3.35e12, 132, 1.98e9),
    Gpu("B200", 10, 2250e12, 7.7e12, 148, 1.965e9),
)

MODELS = (  # name, V, D
    ("Gemma 3 270M", 262144, 640),
    ("Qwen2.5 0.5B", 151936, 896),
    ("Llama 3.1 8B", 128256, 4096),
    ("Qwen3 32B", 151936, 5120),
)


@dataclass(frozen=True)
class Work:
    kernel: str
    flops: float
    exps: float
    dram: float
    tile_fetches: float = 0.0
    """Bytes from the second-level cache to the multiprocessors' shared memory."""
    serial_epilogue: bool = False
    """One program fits on a multiprocessor at a time, so that its exponentials wait for its products."""

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        exps = self.exps / (gpu.sms * gpu.hertz * gpu.exps_per_clock)
        return {"tensor": self.flops / gpu.tensor, "exp": exps, "DRAM": self.dram / gpu.dram}

    def reachable(self, gpu: Gpu) -> tuple[str, float]:
        """The resource that limits the kernel, and its time over the best that the tile plan allows."""
        seconds = self.seconds(gpu)
        limit = max(seconds, key=seconds.__getitem__)
        best = max(seconds["tensor"] + seconds["exp"], seconds["DRAM"]) if self.serial_epilogue else seconds[limit]
        return limit, seconds[limit] / best


def works(gpu: Gpu, V: int, D: int) -> Iterator[Work]:
    yield from single_pass(gpu, V, D)
    yield from recompute(gpu, V, D)
    of_each = INT64 + 5 * F32  # cu_seqlens; reference, reward, lse of the first token, residual, its gradient
    yield Work("residual and its gradient (both)", 0, 0, 3 * T * F32 + TRAJECTORIES * of_each)


def single_pass(gpu: Gpu, V: int, D: int) -> Iterator[Work]:
    config = launch.EXP_CONFIGS[gpu.major, True]
    hidden, weight, logits = T * D, V * D, T * V
    row_tiles, tiles = ceil(T / config.block_t), ceil(V / config.block_v)
    group = max(1, exps.GROUP_BYTES // (config.block_t * D * BF16))
    sums = 2 * tiles * T * F32  # and the largest of each tile
    yield Work("target's logit (single pass)", 0, 0, 2 * hidden * BF16 + T * (INT64 + 2 * F32))
    yield Work(
        "exponentials (single pass)",
        2.0 * T * V * D,
        logits,
        # The hidden states of a group of row tiles stay in the cache, so that each group reads the weight once.
        (hidden + ceil(row_tiles / group) * weight + logits) * BF16 + sums,
        row_tiles * tiles * (config.block_t + config.block_v) * D * BF16,
        serial_epilogue=True,
    )
    yield Work("sums (single pass)", 0, 2 * T, 2 * sums)  # once more after rows that did not fit
    yield Work("rows (single pass)", 0, T, 2 * hidden * BF16 + 10 * T * F32)
    chunks = ceil(T / (CHUNK_BYTES_PER_VOCABULARY_ENTRY["cuda"] // BF16))
    gradient = weight * BF16 if chunks == 1 else (2 * chunks - 1) * weight * F32 + weight * (F32 + BF16)
    products = (2 * logits + chunks * weight + hidden) * BF16 + gradient + 2 * hidden * F32 + hidden * BF16
    yield Work("cuBLAS: dH and dW (single pass)", 4.0 * T * V * D, 0, products)


def recompute(gpu: Gpu, V: int, D: int) -> Iterator[Work]:
    config = launch.CONFIGS[gpu.major, torch.bfloat16][0]
    config = next(iter(launch.WIDE_CONFIGS.get((gpu.major, torch.bfloat16), ())), config)
    product = 2.0 * T * V * D
    hidden, weight, logits = T * D, V * D, T * V
    row_tiles, tiles = ceil(T / config.block_t), ceil(V / config.block_v)
    fetched = row_tiles * tiles * (config.block_t + config.block_v) * D * BF16
    passes = ceil(row_tiles / gpu.sms)
    scoring = next(work for work in single_pass(gpu, V, D) if work.kernel.startswith("exponentials"))
    yield replace(scoring, kernel="exponentials' sums alone (recompute)", dram=scoring.dram - logits * BF16)
    width = config.block_v * max(1, head.SCRATCH_BYTES // (T * config.block_v * BF16))
    slices = ceil(V / width)
    operands = slices * hidden + passes * weight
    yield Work("dlogits (recompute)", product, logits, (operands + logits) * BF16, fetched, serial_epilogue=True)
    # Both products read dlogits; hidden is read, and its gradient read and written in float32, once per slice.
    products = (2 * logits + weight + slices * hidden) * BF16 + 2 * slices * hidden * F32 + weight * (2 * F32 + BF16)
    yield Work("cuBLAS: dH and dW (recompute)", 2 * product, 0, products)


def main() -> None:
    lines = [
        __doc__ or "",
        f"T = {T} tokens in {TRAJECTORIES} trajectories, bfloat16. Times in ms, without launches (microseconds each).",
        "",
    ]
    for gpu in GPUS:
        lines += [
            f"## {gpu.name}: {gpu.tensor / 1e12:.0f} TFLOP/s, {gpu.dram / 1e12:.2f} TB/s, {gpu.sms} multiprocessors",
            "",
        ]
        lines += ["| model | kernel | tensor | exp | DRAM | limited by | reachable | L2 fetch rate at that speed |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for name, V, D in MODELS:
            totals: dict[str, float] = {"single pass": 0.0, "recompute": 0.0}
            for work in works(gpu, V, D):
                seconds = work.seconds(gpu)
                limit, reachable = work.reachable(gpu)
                best = seconds[limit] / reachable
                fetch = f"{work.tile_fetches / best / 1e12:.1f} TB/s" if work.tile_fetches else ""
                cells = [f"{1e3 * seconds[key]:.3g}" for key in ("tensor", "exp", "DRAM")]
                lines.append(f"| {name} | {work.kernel} | {' | '.join(cells)} | {limit} | {reachable:.0%} | {fetch} |")
                for way in totals:
                    if way in work.kernel or "both" in work.kernel:
                        totals[way] += best
            product = 2 * T * V * D / gpu.tensor
            score = next(work for work in recompute(gpu, V, D)).seconds(gpu)
            lines.append(
                f"| {name} | **single pass {totals['single pass'] / product / 3:.2f}, recompute "
                f"{totals['recompute'] / product / 3:.2f} times three products at the tensor cores' rate, scoring "
                f"{(score['tensor'] + score['exp']) / product:.2f} times one** | | | | | | |"
            )
        lines.append("")
    Path(sys.argv[1]).write_text("# Roofline of the Triton backend\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
