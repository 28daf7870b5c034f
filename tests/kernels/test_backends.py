"""The registry of backends, and what importing the library brings with it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tbrm_kernels import backends, linear_token_stats
from tbrm_kernels.backends import registry
from tbrm_kernels.backends import torch as torch_backend

CPU = torch.device("cpu")


def test_the_torch_backend_runs_on_any_device() -> None:
    for device in (None, "cpu", "cuda", torch.device("mps")):
        assert backends(device)["torch"] == registry.BackendStatus(usable=True, reason="")


def test_auto_and_the_name_give_the_same_backend() -> None:
    assert registry.select("auto", CPU) is registry.select("torch", CPU) is torch_backend


@pytest.fixture
def gpu_only(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A preferred backend that runs on a GPU alone, since none that is shipped is refused anywhere."""

    def why_not(device: torch.device) -> str | None:
        return None if device.type == "cuda" else "it needs a GPU"

    backend = SimpleNamespace(why_not=why_not)
    monkeypatch.setattr(registry, "_BACKENDS", {"gpu_only": backend, **registry._BACKENDS})
    return backend


def test_auto_takes_the_first_that_can_run(gpu_only: SimpleNamespace) -> None:
    assert registry.select("auto", torch.device("cuda")) is gpu_only
    assert registry.select("auto", CPU) is torch_backend
    assert list(backends("cpu")) == ["gpu_only", "torch"]
    assert backends("cpu")["gpu_only"] == registry.BackendStatus(usable=False, reason="it needs a GPU")


@pytest.mark.usefixtures("gpu_only")
def test_asking_by_name_for_one_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="backend 'gpu_only' cannot run on cpu: it needs a GPU"):
        linear_token_stats(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([0]), backend="gpu_only")


def test_importing_needs_torch_and_nothing_of_the_trainer() -> None:
    """Blocked in a fresh interpreter, as if they were not installed."""
    blocked = ["transformers", "pydantic", "yaml", "tqdm", "matplotlib", "reasoning_gym", "safetensors", "tbrm"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
import torch, tbrm_kernels
stats = tbrm_kernels.linear_token_stats(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4]))
assert stats.lse.shape == (2,)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
