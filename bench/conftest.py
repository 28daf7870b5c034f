"""Benchmarks print the machine they ran on: a figure without it means nothing."""

from __future__ import annotations

import torch


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}"
