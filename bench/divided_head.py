"""What the head takes of each process's memory where the vocabulary is divided over 1, 2 and 4 of them.

    make bench-memory

The TBRM loss forward and backward of the benchmark's problem, with the weight's rows cut over the processes (the kernels'
`tp_group`): weight, gradients, and what the kernel takes at its peak, in fresh processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.machine import processor
from bench.problem import D, Problem
from bench.ways import single_pass
from bench.worker import begin_peak_anew, taken_mib

VOCABULARIES = (49152, 151936)
PROCESSES = (1, 2, 4)
TOKENS = 1024  # of all processes together: each computes its rows for all of them


def worker(vocab: int) -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    for _ in range(2):  # the first brings in code, threads and the group's buffers
        problem = Problem(vocab, TOKENS, torch.bfloat16)
        weight = problem.weight.detach().chunk(count)[rank].clone().requires_grad_()
        problem.weight = weight
        before = begin_peak_anew()
        loss = single_pass(problem, dist.group.WORLD)
        loss.backward()
        mine = taken_mib(peak=True) - before + weight.nbytes / 2**20
    everybodys: list[Any] = [None] * count
    dist.all_gather_object(everybodys, mine)
    if rank == 0:
        print(json.dumps({"mib": max(everybodys), "loss": loss.item()}))
    dist.destroy_process_group()


def measure(vocab: int, processes: int) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*command, "-m", "bench.divided_head", str(vocab)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(out: Path) -> None:
    lines = [
        f"Made by `make bench-memory` on {processor()}, torch {torch.__version__}, gloo: the TBRM loss forward and",
        f"backward, {TOKENS} tokens of all processes together, D = {D}, bfloat16. Memory of the process that takes most: its",
        "rows of the weight, gradients, and the kernel's scratch at its peak.",
        "",
        "| V | processes | MiB | of one process | loss |",
        "|---|---|---|---|---|",
    ]
    for vocab in VOCABULARIES:
        alone = 0.0
        for processes in PROCESSES:
            found = measure(vocab, processes)
            alone = alone or found["mib"]
            row = f"| {vocab} | {processes} | {found['mib']:.0f} | {found['mib'] / alone:.2f} | {found['loss']:.6g} |"
            print(row, flush=True)
            lines.append(row)
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    worker(int(sys.argv[1])) if sys.argv[1].isdigit() else main(Path(sys.argv[1]))
