"""What only the CPU backend has: the weight's gradient summed in two 16-bit halves, and lanes of tokens in its scratch."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tbrm_kernels import TokenStats, backends, fused_linear_trajectory_loss, linear_token_stats
from tbrm_kernels.backends import cpu
from tests.kernels.heads import Head, assert_as_good_as_plain_torch, random_head, values_and_gradients

pytestmark = pytest.mark.skipif(not backends("cpu")["cpu"].usable, reason="its kernels are not built")

HALVES = (torch.bfloat16, torch.float16)


def per_token(stats: TokenStats, *_: object) -> Tensor:
    return (stats.logprobs.square() + stats.lse).sum()


def weight_gradient(head: Head, lengths: list[int], tokens: int | None = 32, backend: str = "cpu") -> Tensor:
    """In chunks of so many tokens, or where logits take 2 bytes of twice as many; None for the default."""
    weight = head.weight.detach().requires_grad_()
    loss, _ = fused_linear_trajectory_loss(
        head.hidden,
        weight,
        head.targets,
        torch.tensor([0, *lengths]).cumsum(0),
        per_token,
        max_chunk_bytes=None if tokens is None else 4 * tokens * len(weight),
        backend=backend,
    )
    loss.backward()
    assert weight.grad is not None
    return weight.grad


def test_the_halves_make_a_float32_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float16 operands are multiplied as float32, so that a float32 weight of the same values gets the same gradient."""
    monkeypatch.setattr(cpu, "CHUNK_TOKENS", 32)
    head = random_head(20 * 32, 300, 70, torch.float16, bias=False)

    def gradient(head: Head) -> Tensor:  # not by the single pass, which holds it in float32
        weight = head.weight.requires_grad_()
        per_token(linear_token_stats(head.hidden, weight, head.targets, backend="cpu")).backward()
        assert weight.grad is not None
        return weight.grad

    sums = gradient(Head(head.hidden.float(), head.weight.float(), None, head.targets))
    rounded_once = torch.finfo(torch.float16).eps / 2 * sums.abs() + 2**-25  # half of the least float16 above 0
    assert ((gradient(head) - sums).abs() <= 1.01 * rounded_once).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_error_does_not_grow_with_the_number_of_chunks(dtype: torch.dtype) -> None:
    lengths = [32] * 64
    head = random_head(sum(lengths), 200, 40, dtype, bias=False)
    truth = weight_gradient(head.double(), lengths, backend="torch")
    one_chunk, many = (weight_gradient(head, lengths, tokens) for tokens in (sum(lengths), 32))
    assert (many - truth).norm() <= 1.02 * (one_chunk - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        pytest.param([64, 64, 64], 128, id="all targets of the last chunk ignored"),
        pytest.param([64, 64, 64], 0, id="all targets ignored"),
        pytest.param([64, 0, 200, 0, 0], 264, id="a trajectory in pieces and empty ones at the end"),
        pytest.param([64, 0, 200, 0], 150, id="the last piece ignored, and an empty one at the end"),
    ],
)
def test_the_gradient_is_rounded_whatever_comes_last(dtype: torch.dtype, lengths: list[int], kept: int) -> None:
    head = random_head(sum(lengths), 300, 24, dtype, bias=False)
    head.targets[kept:] = -100
    gradient = weight_gradient(head, lengths)
    truth = weight_gradient(head.double(), lengths, backend="torch")
    assert (gradient - truth).norm() <= 16 * torch.finfo(dtype).eps * truth.norm()
    without = Head(head.hidden[:kept], head.weight, None, head.targets[:kept])
    bounds = torch.tensor(lengths).cumsum(0).clamp(max=kept)
    assert torch.equal(gradient, weight_gradient(without, bounds.diff(prepend=torch.tensor([0])).tolist()))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_nan_survives_the_halves(dtype: torch.dtype) -> None:
    lengths = [64, 64, 64]
    head = random_head(sum(lengths), 300, 24, dtype, bias=False)
    head.hidden[3, 5] = torch.nan
    gradient = weight_gradient(head, lengths)
    assert gradient.isnan().all()  # of the first chunk: every entry of the softmax is NaN there


class Allocations(TorchDispatchMode):
    """The bytes of every tensor that an operation returns, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.bytes[storage.data_ptr()] = storage.nbytes()
                self._alive.append(storage)  # so that no other gets its address
        return result


@pytest.mark.parametrize("tokens", [32, 40, 63, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_scratch_is_within_max_chunk_bytes(dtype: torch.dtype, tokens: int) -> None:
    """The lanes that pad a chunk to whole strips included; one strip of 32 tokens is the least there can be."""
    head = random_head(17 * 40, 3000, 4, dtype, bias=False, ignored=0)
    with Allocations() as allocations:
        weight_gradient(head, [17] * 40, tokens)
    budget = 4 * tokens * len(head.weight)
    assert budget / 2 < max(allocations.bytes.values()) <= budget


@pytest.mark.parametrize(
    ("dtype", "tokens", "bytes_per_entry"),
    [
        pytest.param(torch.bfloat16, 32, [2, 2], id="the gradient, and the lower halves of a sum over several chunks"),
        pytest.param(torch.bfloat16, 128, [2], id="the gradient alone"),
        pytest.param(torch.float16, 32, [4, 2], id="float16: held in float32 until it is scaled"),
        pytest.param(torch.float16, 128, [4, 2], id="float16, one chunk"),
    ],
)
def test_what_is_made_of_the_weights_shape(dtype: torch.dtype, tokens: int, bytes_per_entry: list[int]) -> None:
    head = random_head(4 * 32, 400, 600, dtype, bias=False, ignored=0)
    with Allocations() as allocations:
        weight_gradient(head, [32] * 4, tokens // (2 if dtype == torch.bfloat16 and cpu.multiplies_bfloat16() else 1))
    del allocations.bytes[head.weight.data_ptr()]
    large = [size for size in allocations.bytes.values() if size >= 400 * 600]
    assert large == [size * 400 * 600 for size in bytes_per_entry]


def test_by_default_one_chunk_takes_what_several_and_their_sum_would() -> None:
    bytes_per_logit = 2 if cpu.multiplies_bfloat16() else 4
    usual, plane = 1024 * 400, 2 * 400 * 600  # V = 400, D = 600
    most = (usual + plane) // (bytes_per_logit * 400 * 32)  # trajectories, of 32 tokens
    for trajectories, scratch, halves in ((most, bytes_per_logit * 400 * 32 * most, 0), (most + 1, usual, 1)):
        head = random_head(32 * trajectories, 400, 600, torch.bfloat16, bias=False, ignored=0)
        with Allocations() as allocations:
            weight_gradient(head, [32] * trajectories, None)
        sizes = list(allocations.bytes.values())
        assert scratch in sizes
        assert sizes.count(plane) == 2 + halves  # weight and gradient


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    """V, D and T fill no block, panel, tile or step; several of each."""
    head = random_head(5 * 37, 1001, 333, dtype, ignored=0.1)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        leaves = [x.detach().requires_grad_() for x in (head.hidden, head.weight, head.bias) if x is not None]
        loss, stats = fused_linear_trajectory_loss(
            leaves[0],
            leaves[1],
            head.targets,
            torch.arange(0, 5 * 37 + 1, 37),
            per_token,
            bias=leaves[2],
            max_chunk_bytes=4 * 80 * 1001,
            backend="cpu",
        )
        loss.backward()
        results.append([loss.detach(), stats.logprobs, stats.lse, *(leaf.grad for leaf in leaves)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_statistics_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    head = random_head(150, 1001, 333, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(values_and_gradients(partial(linear_token_stats, backend="cpu"), head, entropy=True))
    for others in results[1:]:
        assert all(torch.equal(value, others[name]) for name, value in results[0].items())


def test_bfloat16_on_a_processor_without_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are widened and multiplied as float32, exactly."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    assert_as_good_as_plain_torch(random_head(150, 1001, 333, torch.bfloat16), slack=16, entropy=True)
    test_the_gradient_is_rounded_whatever_comes_last(torch.bfloat16, [64, 0, 200, 0, 0], 264)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this processor has no AVX-512")
def test_the_library_for_avx2() -> None:
    """What other processors load, on this one: torch, oneDNN and we are told that there is no AVX-512."""
    narrow = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    code = "from tbrm_kernels.backends.cpu import *; print(torch.backends.cpu.get_cpu_capability(), not_loaded())"
    loaded = subprocess.run([sys.executable, "-c", code], env=narrow, capture_output=True, text=True)
    assert loaded.stdout.split() == ["AVX2", "None"], loaded.stderr
    chosen = ["-k", "cpu and (any_packing or extreme or rows_of or shapes_and_dtypes or width_of_several)"]
    files = [
        str(Path(__file__).parents[1] / name)
        for name in ("test_single_pass.py", "test_token_stats.py", "backends/test_cpu.py")
    ]
    done = subprocess.run([sys.executable, "-m", "pytest", *files, *chosen], env=narrow, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("width", [640, 1024], ids=["640: Gemma 3 270M", "1024: float32 rows are a page apart"])
def test_a_width_of_several_panels(dtype: torch.dtype, width: int) -> None:
    """With chunks of ragged strips and a vocabulary that ends within a block and a step."""
    assert_as_good_as_plain_torch(random_head(150, 1001, width, dtype), slack=16, entropy=True)
