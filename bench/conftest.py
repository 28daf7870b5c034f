"""Benchmarks print and keep the machine they ran on: a figure without it means nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

_FAILURES = pytest.StashKey[list[dict[str, Any]]]()


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}"


def pytest_report_header() -> str:
    return machine()


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = machine()


@pytest.fixture
def failures(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """What could not be measured, and why: results too."""
    return pytestconfig.stash.setdefault(_FAILURES, [])


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["failures"] = config.stash.get(_FAILURES, [])
