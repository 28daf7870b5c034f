"""Peak memory of each way beyond its inputs, gradients included, each in a process of its own.

python -m bench.peak_memory OUT.json
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from bench.problem import Problem
from bench.shapes import DTYPES, shapes
from bench.ways import WAYS


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, vocab: int, tokens: int, dtype: torch.dtype) -> float:
    """MiB that the first step adds to the peak of a process that holds the inputs and has run the way's code before."""
    WAYS[way](Problem(64, 4, dtype)).backward()  # imports, compilation, thread pools
    problem = Problem(vocab, tokens, dtype)
    # Initialising the inputs took more than holding them: fill memory up to that peak, so that the step starts from it.
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    filler = torch.ones(max(0, int((peak_mib() - resident) * 2**20 / 4)))
    before = peak_mib()
    WAYS[way](problem).backward()
    del filler
    return peak_mib() - before


def main() -> None:
    if len(sys.argv) == 5:
        way, vocab, tokens, dtype = sys.argv[1:]
        print(measure(way, int(vocab), int(tokens), DTYPES[dtype]))
        return
    rows = []
    cases = [(way, v, t, name) for v, t in shapes() for name in DTYPES for way in WAYS]
    for way, vocab, tokens, dtype in tqdm(cases, desc="peak memory", disable=None):
        command = [sys.executable, "-m", "bench.peak_memory", way, str(vocab), str(tokens), dtype]
        done = subprocess.run(command, capture_output=True, text=True)
        # A failure (a library that is missing, memory that runs out) is a result too.
        failure = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]
        result = {"peak_mib": float(done.stdout)} if done.returncode == 0 else {"failure": failure}
        rows.append({"way": way, "vocab": vocab, "tokens": tokens, "dtype": dtype, **result})
    Path(sys.argv[1]).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
