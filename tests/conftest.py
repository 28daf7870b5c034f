"""What all tests have in common: kernels in Triton's interpreter where there is no GPU, and which tests take long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = Path(__file__).parent
SLOW = (
    "bench",
    "examples",
    "kernels/backends/test_exps.py",
    "kernels/backends/test_triton.py",
    "kernels/backends/test_triton_aot.py",
    "kernels/test_wheel.py",
    "tbrm/commands",
    "tbrm/experience/test_ahead.py",
    "tbrm/plan",
    "tbrm/processes",
    "tbrm/reporting",
    "tbrm/rollout/vllm",
    "tbrm/test_parallel.py",
    "tbrm/training",
)
"""What starts vLLM, torchrun or commands, trains, or is interpreted; `make test-fast` leaves it out, and tests that are marked
one by one."""
SEVERAL_PROCESSES = (
    "examples",
    "tbrm/experience/test_ahead.py",
    "tbrm/policy/test_architectures.py",
    "tbrm/processes",
    "tbrm/rollout/vllm",
    "tbrm/test_parallel.py",
    "tbrm/training/test_faults.py",
    "test_readme.py",
)
"""What starts several processes at once, some with time limits: with `make test`'s two workers all of it is one worker's."""


def pytest_itemcollected(item: pytest.Item) -> None:
    path = item.path.relative_to(HERE).as_posix()
    interpreted = getattr(item, "callspec", None) and item.callspec.params.get("backend") == "triton"
    if interpreted or _within(path, SLOW):
        item.add_marker(pytest.mark.slow)
    # A file is one worker's from its beginning to its end, with what its tests share.
    item.add_marker(pytest.mark.xdist_group("several processes" if _within(path, SEVERAL_PROCESSES) else path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, or the last would be waited for."""
    items.sort(key=lambda item: not _within(item.path.relative_to(HERE).as_posix(), SEVERAL_PROCESSES))


def _within(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)
