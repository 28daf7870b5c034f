"""One training step of this trainer, of TRL's GRPOTrainer and of plain PyTorch, on the same 64 recorded trajectories.

    make bench-step                                  # some ten minutes on two quiet cores

A step is: scores of the reference, forward and backward, clipping, AdamW; nothing is generated. Each way runs in a process of
its own, one after the other, and is not timed unless its log-probs of all actions agree with ours in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.machine import processor
from bench.step_ways import ROUNDS, WAYS, padded_tokens, precision, recorded
from bench.worker import Worker

LARGEST_GAP = 1e-3  # of a log-prob, in float32


def main(out: Path) -> None:
    ours: torch.Tensor | None = None
    measured: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        logprobs = torch.tensor(ask(way, "float32", "logprobs")["values"])
        ours = logprobs if ours is None else ours
        gap = float((logprobs - ours).abs().max())
        if not gap < LARGEST_GAP:
            raise SystemExit(f"{way}: a log-prob differs from ours by {gap}")
        measured[way] = {**ask(way, precision(), "steps"), "gap": gap}
        print(f"{way}: {measured[way]}", flush=True)
    out.write_text(table(measured))
    print(f"{out} is written")


def ask(way: str, precision: str, question: str) -> dict[str, Any]:
    with Worker(way, precision, module="bench.step_ways") as worker:
        return worker.ask(question)


def table(measured: dict[str, dict[str, Any]]) -> str:
    largest = max(found["gap"] for found in measured.values())
    lines = [
        f"Made by `make bench-step` on {processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads: a step of",
        f"SmolLM2-135M-Instruct on {len(recorded())} trajectories ({padded_tokens():,} tokens with padding), float32 weights,",
        f"{precision()} products, AdamW, reference scores included. Median of {ROUNDS} rounds after a first one; peak of the",
        f"whole process. In float32 the log-probs of all ways are within {largest:.0e} of each other's.",
        "Floor: the matrix products of a way's own step, each timed by itself in the same process, and the memory traffic that",
        "clipping and AdamW cannot do without (bench/products.py).",
        "",
        "| | seconds | over ours | over its floor | floor: products, TFLOP | seconds | optimiser | peak, MiB | over ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(measured.values()))
    for way, found in measured.items():
        seconds, peak = median(found["seconds"]), found["peak_mib"]
        relative = f"{seconds / median(first['seconds']):.2f}", f"{peak / first['peak_mib']:.2f}"
        bare = [""] * 4
        if "operations" in found:
            bare = [f"{seconds / found['seconds_of_floor']:.2f}", f"{found['operations'] / 1e12:.2f}"]
            bare += [f"{found[part]:.2f}" for part in ("products", "of_optimiser")]
        lines.append(f"| {way} | {seconds:.2f} | {relative[0]} | {' | '.join(bare)} | {peak:.0f} | {relative[1]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
