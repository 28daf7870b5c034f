"""liger-kernel's own Triton kernels, which on a CPU need Triton's interpreter, and that a process of its own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tbrm.config.section import ConfigError
from tbrm.policy.liger import use_liger_kernels
from tbrm.policy.load import load_policy
from tbrm.policy.model import PolicyModel
from tbrm.policy.sharded import frozen_copy
from tbrm.trajectories.packing import pack
from tests.tbrm.conftest import make_lm, tiny_config
from tests.tbrm.policy.test_model import trajectories

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

import triton
import triton.language as tl

ARCHITECTURES = ("llama", "qwen3", "gemma3")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stats_and_gradients_are_those_of_the_model_itself(architecture: str) -> None:
    command = [sys.executable, "-m", "tests.tbrm.policy.test_liger", architecture]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def compare(architecture: str) -> None:
    lm = make_lm(architecture, tied=True)
    batch = pack(trajectories())
    found = []
    plain = PolicyModel(copy.deepcopy(lm))
    for policy in (plain, PolicyModel(lm, liger=True)):
        stats = policy(batch)
        (stats.logprobs.sum() + stats.lse.sum()).backward()
        found.append([stats.logprobs, stats.lse, *(p.grad for p in policy.parameters())])
    assert "Liger" in str(lm), "no kernel was put in"
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    frozen = frozen_copy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    torch.testing.assert_close(frozen(batch).logprobs, found[1][0], rtol=0, atol=0)


def test_a_kind_of_model_that_liger_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no kernels for 'cohere'"):
        use_liger_kernels(make_lm("cohere", tied=True))


def test_without_liger_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ValueError, match=r"liger-kernel is missing .* pip install 'tbrm\[gpu\]'"):
        use_liger_kernels(make_lm("llama", tied=True))


def test_liger_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.liger: true; wants a GPU, and this is cpu"):
        load_policy(tiny_config(tmp_path, model__liger=True, model__device="cpu"))


@triton.jit
def rsqrt(x):  # type: ignore[no-untyped-def]
    return 1 / tl.sqrt(x)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


def complete_the_interpreter() -> None:
    """It has no libdevice, and leaves a float that a kernel is given as it is, where the compiler makes a scalar of it."""
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument: object) -> object:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt, rms_norm.rsqrt, geglu.tanh = converted, rsqrt, tanh


if __name__ == "__main__":
    complete_the_interpreter()
    compare(sys.argv[1])
