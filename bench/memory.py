"""How a training step's memory falls with the number of processes, with and without a divided vocabulary.

    make bench-memory

Two steps of recipes/chain_sum.yaml in fresh processes, rollouts included: `peak_memory_mib` of metrics.jsonl, of the process
that holds most, less what an idle process holds that has imported the trainer. Fails if 4 processes hold more than 0.40 of one.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

from bench.machine import processor
from bench.plan_check import IDLE, peak_mib, python

SETTINGS = (
    *("rollout.prompts=64", "trainer.batch_tokens=4096", "trainer.steps=2", "optim.warmup_steps=0"),
    *("evaluation.prompts=0", "model.precision=bfloat16"),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "4194304"}
AT_MOST = 0.40  # of one process's, on 4

HEAD = """Made by `make bench-memory` on {processor}, torch {torch}, gloo: recipes/chain_sum.yaml (SmolLM2-135M-Instruct) with
64 prompts a step of one response each, micro-batches of at most 4,096 tokens, bfloat16 products, float32 weights and moments,
the reference, two steps. MiB of the process that holds most, beyond the {idle:.0f} of an idle one that has imported the
trainer:

    {environment} torchrun --nproc-per-node 4 -m tbrm train recipes/chain_sum.yaml {settings}

| processes | peak, MiB | of one process | with `parallel.vocab_parallel=true` | of one process |
|---|---|---|---|---|
"""


def main(out: Path) -> None:
    os.environ.update(ENVIRONMENT)
    idle = int(python("-c", IDLE)) / 1024
    rows, alone, shares = [], 0.0, {}
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2, 4):
            cells = [str(processes)]
            for divided in (False, True) if processes > 1 else (False,):
                overrides = [*SETTINGS, *(["parallel.vocab_parallel=true"] if divided else [])]
                taken = peak_mib(overrides, processes, Path(folder) / "run") - idle
                alone = alone or taken
                shares[processes] = max(taken / alone, shares.get(processes, 0.0))
                cells += [f"{taken:.0f}", f"{taken / alone:.2f}"]
            rows.append(f"| {' | '.join(cells + [''] * (5 - len(cells)))} |")
            print(rows[-1], flush=True)
    environment = " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items())
    head = HEAD.format(
        processor=processor(),
        torch=torch.__version__,
        idle=idle,
        environment=environment,
        settings=" ".join(SETTINGS),
    )
    out.write_text(head + "\n".join(rows) + "\n")
    if shares[4] > AT_MOST:
        sys.exit(f"4 processes hold {shares[4]:.2f} of one process's memory, and may hold {AT_MOST}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
