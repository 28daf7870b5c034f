"""Benchmarks print and keep the machine they ran on: a figure without it means nothing."""

from __future__ import annotations

from typing import Any

import torch


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}"


def pytest_report_header() -> str:
    return _machine()


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = _machine()
