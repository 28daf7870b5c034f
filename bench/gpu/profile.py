"""Where the time of the fused loss goes, kernel by kernel: forward and backward with the heads of an 8B and a 0.5B model.

python -m bench.gpu.profile build/gpu/profile.txt build/gpu/trace.json.gz
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.cells import HEADS, TINY, TINY_TOKENS, TOKENS, Head
from bench.machine import processor
from bench.problem import Problem
from bench.shapes import DEVICE
from bench.ways import single_pass
from bench.worker import wait_for_device

ON_GPU = DEVICE.type == "cuda"
ROUNDS = 2


def main(text: Path, trace: Path) -> None:
    smallest, middle = HEADS[:2] if ON_GPU else TINY * 2
    profiled(middle, text).export_chrome_trace(str(trace))
    profiled(smallest, text)


def profiled(head: Head, text: Path) -> profile:
    problem = Problem(head.vocab, TOKENS if ON_GPU else TINY_TOKENS, torch.bfloat16, head.width)

    def step() -> None:
        problem.hidden.grad = problem.weight.grad = None
        single_pass(problem).backward()
        wait_for_device()

    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]) as found:
        for _ in range(ROUNDS):
            step()
    name = torch.cuda.get_device_name() if ON_GPU else processor()
    order = f"self_{'device' if ON_GPU else 'cpu'}_time_total"
    shape = f"V = {head.vocab}, D = {head.width}, T = {len(problem.targets)}"
    table = found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)
    with text.open("a") as file:
        file.write(
            f"{name}, the {head.name} head ({shape}), {ROUNDS} times forward and backward, bfloat16\n{table}\n\n"
        )
    return found


if __name__ == "__main__":
    torch.set_default_device(DEVICE)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
