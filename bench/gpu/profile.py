"""Where the time of the fused loss goes, kernel by kernel: forward and backward with the 8B model's head.

python -m bench.gpu.profile build/gpu/profile.txt build/gpu/trace.json.gz
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.cells import HEADS, TINY, TINY_TOKENS, TOKENS
from bench.problem import Problem
from bench.shapes import DEVICE
from bench.ways import single_pass
from bench.worker import wait_for_device

ROUNDS = 2


def main(text: Path, trace: Path) -> None:
    on_gpu = DEVICE.type == "cuda"
    head = HEADS[1] if on_gpu else TINY[1]
    problem = Problem(head.vocab, TOKENS if on_gpu else TINY_TOKENS, torch.bfloat16, head.width)

    def step() -> None:
        problem.hidden.grad = problem.weight.grad = None
        single_pass(problem).backward()
        wait_for_device()

    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(ROUNDS):
            step()
    name = torch.cuda.get_device_name() if on_gpu else "the CPU"
    order = "cuda_time_total" if on_gpu else "cpu_time_total"
    shape = f"V = {head.vocab}, D = {head.width}, T = {len(problem.targets)}"
    table = profiled.key_averages().table(sort_by=f"self_{order}", row_limit=25, max_name_column_width=70)
    text.write_text(f"{name}, the {head.name} head ({shape}), {ROUNDS} times forward and backward, bfloat16\n{table}\n")
    profiled.export_chrome_trace(str(trace))


if __name__ == "__main__":
    torch.set_default_device(DEVICE)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
