"""The card, the versions, the clocks, and the two ceilings that every other figure is held to: a copy and a matrix product.

python -m bench.gpu.card build/gpu/card.jsonl
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu.json_lines import append
from bench.gpu.timing import Stopwatch
from bench.machine import processor
from bench.shapes import DEVICE

QUERIES = (
    "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu,power.draw,power.limit",
    "clocks_event_reasons.active",  # older drivers do not know it
)
PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "pydantic", "liger-kernel", "cut-cross-entropy", "flash-attn"),
    *("pytest-xdist", "pytest-timeout"),
)
ROUNDS = 10


NO_GPU = 3  # exit status: with anything else that fails here, the other stages may still have something to say


def main(out: Path) -> None:
    on_gpu = DEVICE.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("torch sees no GPU here: bench/gpu.sh --dry-run tries the stages on the CPU")
        sys.exit(NO_GPU)
    append(out, {"what": "card", "value": torch.cuda.get_device_name() if on_gpu else processor()})
    append(out, {"what": "python", "value": platform.python_version()})
    for package in PACKAGES:
        append(out, {"what": package, "value": version(package)})
    ceilings(out, on_gpu)
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        append(out, {"what": "CUDA of torch", "value": torch.version.cuda})
        append(out, {"what": "memory, GiB", "value": round(properties.total_memory / 2**30, 1)})
        append(out, {"what": "multiprocessors", "value": properties.multi_processor_count})
        query(out, "after work")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def query(out: Path, when: str) -> None:
    for fields in QUERIES:
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20)
        values = [value.strip() for value in answer.stdout.splitlines()[0].split(",")]
        if answer.returncode == 0:
            for name, value in zip(fields.split(","), values, strict=True):
                append(out, {"what": f"{name}, {when}", "value": value})


def ceilings(out: Path, on_gpu: bool) -> None:
    watch, size = Stopwatch(), 8192 if on_gpu else 256
    left, right = (torch.randn(size, size).bfloat16() for _ in range(2))
    source = torch.randn(2**29 if on_gpu else 2**16)
    target = torch.empty_like(source)
    for _ in range(3):
        left @ right
        target.copy_(source)
    product = min(watch.milliseconds(lambda: left @ right) for _ in range(ROUNDS))
    copy = min(watch.milliseconds(lambda: target.copy_(source)) for _ in range(ROUNDS))
    name = f"bfloat16 product of {size} x {size} x {size}, TFLOP/s"
    append(out, {"what": name, "value": round(2 * size**3 / product / 1e9, 2)})
    gib = source.numel() * 4 / 2**30
    append(out, {"what": f"copy of {gib:.2g} GiB, read and written, TB/s", "value": 2 * source.nbytes / copy / 1e9})
    append(out, {"what": "clock of these, MHz", "value": watch.clock().get("mhz")})


if __name__ == "__main__":
    torch.set_default_device(DEVICE)
    main(Path(sys.argv[1]))
