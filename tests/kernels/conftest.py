from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tbrm_kernels.backends import torch_tiles


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every `torch.empty` is filled with NaN, so that reading memory before writing it fails a test."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture
def set_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes the torch backend work on small tiles, so that small problems have several of them."""

    def set_(row_chunk: int, scratch_elements: int) -> None:
        monkeypatch.setattr(torch_tiles, "ROW_CHUNK", row_chunk)
        monkeypatch.setattr(torch_tiles, "SCRATCH_ELEMENTS", scratch_elements)

    return set_
