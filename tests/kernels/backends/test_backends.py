"""The registry of backends, and what importing the library brings with it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tbrm_kernels import backends, linear_token_stats
from tbrm_kernels.backends import cpu, registry
from tbrm_kernels.backends import torch as torch_backend
from tbrm_kernels.backends import triton as triton_backend
from tbrm_kernels.backends.library import NOTE, library_name

CPU = torch.device("cpu")


def test_the_torch_backend_runs_on_any_device() -> None:
    for device in (None, "cpu", "cuda", torch.device("mps")):
        assert backends(device)["torch"] == registry.BackendStatus(usable=True, reason="")


@pytest.mark.skipif(not (shutil.which("g++") and sys.platform == "linux"), reason="no compiler")
def test_the_cpu_kernels_are_built_where_a_compiler_is() -> None:
    assert backends("cpu")["cpu"] == registry.BackendStatus(usable=True, reason="")


def test_the_cpu_backend_says_where_it_cannot_run() -> None:
    assert backends("cuda")["cpu"].reason == "it runs on the CPU"
    assert "do not take torch.float64" in backends("cpu", torch.float64)["cpu"].reason


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the libraries are looked for: an empty one."""
    monkeypatch.setattr(cpu, "_FOLDER", tmp_path)
    cpu.not_loaded.cache_clear()
    yield tmp_path
    cpu.not_loaded.cache_clear()


AGAIN = r": install tbrm again, where torch and a C\+\+ compiler are \(pip install --force-reinstall .*\)"


def test_without_its_library_the_cpu_backend_says_why_and_how_to_get_it(folder: Path) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    assert re.fullmatch(f"its kernels are not built for {capability}" + AGAIN, backends("cpu")["cpu"].reason)
    cpu.not_loaded.cache_clear()
    (folder / NOTE).write_text("command 'g++' failed: No such file or directory")
    reason = r"its kernels could not be built \(command 'g\+\+' failed: No such file or directory\)"
    assert re.fullmatch(reason + AGAIN, backends("cpu")["cpu"].reason)


def test_a_library_of_another_torch_is_never_loaded(folder: Path) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    (folder / f"{library_name(capability, '1.9.1')}.abi3.so").write_bytes(b"")
    reason = f"its kernels are built for torch 1.9, and this is {re.escape(torch.__version__)}"
    assert re.fullmatch(reason + AGAIN, backends("cpu")["cpu"].reason)
    (folder / f"{library_name(capability, torch.__version__)}.abi3.so").write_bytes(b"")
    cpu.not_loaded.cache_clear()
    assert "do not fit this torch" in backends("cpu")["cpu"].reason  # of this one, and broken


def test_patches_of_a_torch_share_a_library_and_builds_of_no_release_have_their_own() -> None:
    versions = ["2.13.0", "2.13.1+cpu", "2.14.0+cu130", "2.14.0a0+git1", "2.14.0.dev20261101"]
    names = [library_name("AVX2", version) for version in versions]
    assert names[:3] == ["_cpu_avx2_torch2_13", "_cpu_avx2_torch2_13", "_cpu_avx2_torch2_14"]
    assert len(set(names)) == 4


@pytest.mark.usefixtures("folder")
def test_plain_torch_in_the_place_of_kernels_that_are_not_built_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    with pytest.warns(UserWarning, match="plain torch is used, which takes longer: its kernels are not built"):
        linear_token_stats(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([0]))


def test_auto_falls_back_to_torch_for_what_the_kernels_do_not_take_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.select("auto", CPU, torch.float64) is torch_backend


def test_the_triton_backend_says_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "do not take torch.float16" in backends("cpu", torch.float16)["triton"].reason
    assert backends("meta")["triton"].reason == "it runs on NVIDIA GPUs"
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in backends("cpu")["triton"].reason
    monkeypatch.setattr(triton_backend, "INSTALLED", False)
    assert "pip install triton" in backends("cpu")["triton"].reason


@pytest.fixture
def gpu_only(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A preferred backend that runs on a GPU alone, since none that is shipped is refused anywhere."""

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cuda" else "it needs a GPU"

    backend = SimpleNamespace(why_not=why_not)
    monkeypatch.setattr(registry, "_BACKENDS", {"gpu_only": backend, **registry._BACKENDS})
    return backend


def test_auto_takes_the_first_that_can_run(gpu_only: SimpleNamespace) -> None:
    assert registry.select("auto", torch.device("cuda"), torch.float32) is gpu_only
    assert registry.select("auto", CPU, torch.float64) is torch_backend
    assert list(backends("cpu")) == ["gpu_only", "cpu", "triton", "torch"]
    assert backends("cpu")["gpu_only"] == registry.BackendStatus(usable=False, reason="it needs a GPU")


@pytest.mark.usefixtures("gpu_only")
def test_asking_by_name_for_one_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'gpu_only' cannot run on cpu in torch\.float32: it needs a GPU"):
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
