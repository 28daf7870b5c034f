"""What only the CPU backend has: the weight's gradient summed in two 16-bit halves, and lanes of tokens in its scratch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tbrm_kernels import TokenStats, backends, fused_linear_trajectory_loss
from tests.kernels.heads import Head, random_head

pytestmark = pytest.mark.skipif(not backends("cpu")["cpu"].usable, reason="its kernels are not built")

HALVES = (torch.bfloat16, torch.float16)


def per_token(stats: TokenStats, *_: object) -> Tensor:
    return (stats.logprobs.square() + stats.lse).sum()


def weight_gradient(head: Head, lengths: list[int], tokens: int = 32, backend: str = "cpu") -> Tensor:
    """In chunks of so many tokens, or where logits take 2 bytes of twice as many."""
    weight = head.weight.detach().requires_grad_()
    loss, _ = fused_linear_trajectory_loss(
        head.hidden,
        weight,
        head.targets,
        torch.tensor([0, *lengths]).cumsum(0),
        per_token,
        max_chunk_bytes=4 * tokens * len(weight),
        backend=backend,
    )
    loss.backward()
    assert weight.grad is not None
    return weight.grad


def test_the_halves_make_a_float32_sum() -> None:
    """Float16 operands are multiplied as float32, so that a float32 weight of the same values gets the same gradient."""
    lengths = [32] * 20
    head = random_head(sum(lengths), 300, 70, torch.float16, bias=False)
    sums = weight_gradient(Head(head.hidden.float(), head.weight.float(), None, head.targets), lengths)
    rounded_once = torch.finfo(torch.float16).eps / 2 * sums.abs() + 2**-25  # half of the least float16 above 0
    assert ((weight_gradient(head, lengths) - sums).abs() <= 1.01 * rounded_once).all()


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
    truth = weight_gradient(head.double(), lengths, backend="torch")
    assert (weight_gradient(head, lengths) - truth).norm() <= 16 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_nan_survives_the_halves(dtype: torch.dtype) -> None:
    lengths = [64, 64, 64]
    head = random_head(sum(lengths), 300, 24, dtype, bias=False)
    head.hidden[3, 5] = torch.nan
    gradient = weight_gradient(head, lengths)
    assert gradient.isnan().all()  # of the first chunk: every entry of the softmax is NaN there
