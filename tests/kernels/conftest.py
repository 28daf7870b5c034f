from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tbrm_kernels.backends import cpu, registry, torch_tiles
from tests.kernels.heads import DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every `torch.empty` is filled with NaN, so that reading memory before writing it fails a test."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.set_default_device(DEVICE)
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "triton", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What "auto" takes, where it can: each in turn."""
    name: str = request.param
    status = registry.backends(DEVICE)[name]
    if not status.usable:
        pytest.skip(status.reason)
    chosen = {key: registry._BACKENDS[key] for key in (name, "torch")}
    monkeypatch.setattr(registry, "_BACKENDS", chosen)
    return name


@pytest.fixture
def set_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes the backends work on small tiles, so that small problems have several of them."""

    def set_(row_chunk: int, scratch_elements: int) -> None:
        monkeypatch.setattr(torch_tiles, "ROW_CHUNK", row_chunk)
        monkeypatch.setattr(torch_tiles, "SCRATCH_ELEMENTS", scratch_elements)
        monkeypatch.setattr(cpu, "CHUNK_TOKENS", row_chunk)

    return set_
