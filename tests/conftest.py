"""What all tests have in common: kernels in Triton's interpreter where there is no GPU, and which tests take long."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        interpreted = getattr(item, "callspec", None) and item.callspec.params.get("backend") == "triton"
        if interpreted or _within(_place(item.nodeid), SLOW):
            item.add_marker(pytest.mark.slow)
    # The longest first, or the last would be waited for.
    items.sort(key=lambda item: not _within(_place(item.nodeid), SEVERAL_PROCESSES))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file is one worker's from its beginning to its end, with what its tests share."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            place = _place(nodeid)
            return "several processes" if _within(place, SEVERAL_PROCESSES) else place

    return Scheduling(config, log)


def _place(nodeid: str) -> str:
    """A test's file, as seen from here."""
    return nodeid.partition("::")[0].removeprefix("tests/")


def _within(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)
