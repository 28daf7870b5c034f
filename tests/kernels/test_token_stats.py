"""The numbers of linear_token_stats: as near to the float64 definition as plain torch is at the same precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tbrm_kernels import linear_token_stats
from tbrm_kernels.backends import torch_tiles
from tbrm_kernels.reference import token_stats_reference
from tests.kernels.heads import (
    EXAMPLES,
    OUTPUTS,
    Head,
    assert_as_good_as_plain_torch,
    random_head,
    values_and_gradients,
    vocabulary,
)

SetTiles = Callable[[int, int], None]
pytestmark = pytest.mark.usefixtures("backend")


SHAPES = [
    pytest.param(0, 7, 3, id="no tokens at all"),
    pytest.param(1, 1, 1, id="the smallest there is, where p = 1"),
    pytest.param(5, 1, 4, id="one vocabulary entry, where log p = 0 in every row"),
    pytest.param(7, 7, 1, id="hidden width 1"),
    pytest.param(129, 1031, 63, id="odd everywhere, so that the last tile and the last chunk are ragged"),
    pytest.param(2100, 33, 5, id="more rows than two row chunks as shipped"),
    pytest.param(3, 50257, 64, id="a real vocabulary, GPT-2's: several tiles as shipped"),
]
TILES = [pytest.param(None, id="tiles as shipped"), pytest.param((64, 64 * 100), id="small tiles")]


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "vocab", "width"), SHAPES)
def test_shapes_and_dtypes(
    tokens: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    tiles: tuple[int, int] | None,
    set_tiles: SetTiles,
    backend: str,
) -> None:
    if tiles is not None:
        if backend == "triton":
            pytest.skip("its tiles are small as they are")
        set_tiles(*tiles)
    vocab = vocabulary(vocab, backend) if vocab > 10_000 else vocab
    assert_as_good_as_plain_torch(random_head(tokens, vocab, width, dtype), entropy=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "logit_scale": 0.0625, "softcap": 30.0},
        {"temperature": 1e-2},
        {"temperature": 1e2},
        {"softcap": 30.0},
        {"softcap": 0.5, "temperature": 1e-2},
        {"logit_scale": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_options(options: dict[str, float], entropy: bool, dtype: torch.dtype, set_tiles: SetTiles) -> None:
    set_tiles(16, 16 * 50)
    assert_as_good_as_plain_torch(random_head(41, 211, 24, dtype), entropy=entropy, **options)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(
    "through", [("logprobs",), ("lse",), ("entropy",), ("logprobs", "lse"), ("logprobs", "entropy"), OUTPUTS], ids=str
)
def test_gradient_through_any_subset_of_the_outputs(
    through: tuple[str, ...], softcap: float | None, set_tiles: SetTiles
) -> None:
    set_tiles(16, 16 * 50)
    assert_as_good_as_plain_torch(random_head(41, 211, 24), through=through, entropy=True, softcap=softcap)


@settings(max_examples=EXAMPLES * 3 // 2, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 40),
    vocab=st.integers(1, 90),
    width=st.integers(1, 20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    row_chunk=st.integers(1, 50),
    scratch_elements=st.integers(1, 1500),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    through=st.sets(st.sampled_from(OUTPUTS), min_size=1).map(lambda names: tuple(sorted(names))),
    temperature=st.floats(1e-2, 1e2),
    softcap=st.none() | st.floats(1.0, 50.0),
    logit_scale=st.floats(0.05, 2.0),
    seed=st.integers(0, 2**31),
)
def test_any_problem(
    tokens: int,
    vocab: int,
    width: int,
    dtype: torch.dtype,
    row_chunk: int,
    scratch_elements: int,
    bias: bool,
    ignored: float,
    seed: int,
    **options: Any,
) -> None:
    head = random_head(tokens, vocab, width, dtype, bias=bias, ignored=ignored, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_tiles, "ROW_CHUNK", row_chunk)
        patch.setattr(torch_tiles, "SCRATCH_ELEMENTS", scratch_elements)
        # More slack, since tiles of one row or column multiply in an order whose luck differs from the whole product's.
        assert_as_good_as_plain_torch(head, slack=64, entropy=True, **options)


@pytest.mark.parametrize("function", [token_stats_reference, linear_token_stats], ids=["reference", "torch backend"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 0.5, "logit_scale": 1.5}], ids=str)
def test_gradcheck(function: Callable[..., Any], options: dict[str, float], set_tiles: SetTiles) -> None:
    set_tiles(2, 2 * 3)  # 7 rows in 4 chunks, 8 vocabulary entries in 3 tiles
    head = random_head(7, 8, 3, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (head.hidden, head.weight, head.bias) if leaf is not None]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: function(hidden, weight, head.targets, bias=bias, entropy=True, **options), leaves
    )


def test_equal_logits_have_a_known_answer() -> None:
    vocab = 1000
    stats = linear_token_stats(torch.ones(3, 4), torch.ones(vocab, 4), torch.tensor([0, 500, 999]), entropy=True)
    torch.testing.assert_close(stats.logprobs, torch.full((3,), -math.log(vocab)))
    torch.testing.assert_close(stats.lse, torch.full((3,), 4 + math.log(vocab)))
    assert stats.entropy is not None
    torch.testing.assert_close(stats.entropy, torch.full((3,), math.log(vocab)))


def test_logits_of_ten_thousand(set_tiles: SetTiles) -> None:
    set_tiles(2, 2 * 50)
    weight = torch.linspace(-1, 1, 201)[:, None]
    head = Head(torch.tensor([[1e4], [-1e4], [1e4], [50.0]]), weight, None, torch.tensor([200, 0, 0, 17]))
    assert_as_good_as_plain_torch(head, entropy=True)


def test_two_equal_logits_of_ten_thousand_share_the_probability() -> None:
    """The log-sum-exp, 10000.6931, rounds by 2e-4; the probabilities must not inherit that."""
    hidden = torch.tensor([[1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [1.0], [-1.0]], requires_grad=True)
    stats = linear_token_stats(hidden, weight, torch.tensor([1]), entropy=True)
    assert stats.entropy is not None
    for value in (-stats.logprobs, stats.entropy):
        torch.testing.assert_close(value, torch.tensor([math.log(2)]), rtol=1e-6, atol=0)
    stats.lse.sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[0.5e4], [0.5e4], [0.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("masked", [[0, 1, 2], [3], [7, 8], [2, 3, 4, 5, 6, 7, 8]], ids=str)
def test_vocabulary_masked_by_the_bias(masked: list[int], value: float, set_tiles: SetTiles) -> None:
    set_tiles(2, 2 * 3)  # tiles of 3 entries: whole tiles are masked, the first among them
    head = random_head(5, 9, 4)
    assert head.bias is not None
    head.bias[masked] = value
    head.targets[:] = next(v for v in range(9) if v not in masked)
    assert_as_good_as_plain_torch(head, entropy=True)


def test_a_masked_target_has_log_probability_minus_infinity() -> None:
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    stats = linear_token_stats(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([1]), bias=bias)
    assert stats.logprobs.item() == -torch.inf
    torch.testing.assert_close(stats.lse, torch.tensor([math.log(2)]))


def test_nan_stays_in_its_row_and_is_never_hidden(set_tiles: SetTiles) -> None:
    set_tiles(2, 2 * 4)
    head = random_head(6, 10, 4, ignored=0)
    head.hidden[3, 1] = torch.nan
    stats = linear_token_stats(head.hidden, head.weight, head.targets, bias=head.bias, entropy=True)
    for values in stats:
        assert values is not None
        assert values.isnan().tolist() == [False, False, False, True, False, False]

    head.targets[3] = -100
    results = values_and_gradients(linear_token_stats, head, entropy=True)
    assert all(value.isfinite().all() for value in results.values()), "a NaN in an ignored row did harm"


def test_nan_in_the_weight_reaches_every_row(set_tiles: SetTiles) -> None:
    set_tiles(2, 2 * 4)
    head = random_head(6, 10, 4, ignored=0)
    head.weight[7] = torch.nan
    assert linear_token_stats(head.hidden, head.weight, head.targets).logprobs.isnan().all()


@pytest.mark.parametrize("ignored", [0.5, 1.0], ids=["some ignored", "all ignored"])
def test_ignored_rows_are_zero_and_carry_no_gradient(ignored: float) -> None:
    head = random_head(9, 13, 4, ignored=ignored)
    results = values_and_gradients(linear_token_stats, head, entropy=True)
    out = head.targets == -100
    assert out.any()
    for name in (*OUTPUTS, "d_hidden"):
        assert (results[name][out] == 0).all()
    if out.all():
        assert (results["d_weight"] == 0).all()
        assert (results["d_bias"] == 0).all()


def test_ignore_index_may_be_a_token_id() -> None:
    head = random_head(9, 13, 4, ignored=0)
    head.targets[4] = 6
    assert_as_good_as_plain_torch(head, ignore_index=6, entropy=True)


def test_zero_upstream_gradient_gives_zero_gradients() -> None:
    head = random_head(9, 13, 4)
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    stats = linear_token_stats(hidden, weight, head.targets, entropy=True)
    (sum(values.sum() for values in stats if values is not None) * 0).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_strided_inputs() -> None:
    head = random_head(12, 30, 8)
    plain = values_and_gradients(linear_token_stats, head, entropy=True)
    assert head.bias is not None
    strided = Head(
        head.hidden.repeat_interleave(2, dim=1)[:, ::2],
        head.weight.T.contiguous().T,
        head.bias.repeat_interleave(3)[::3],
        head.targets.repeat_interleave(2)[::2],
    )
    results = values_and_gradients(linear_token_stats, strided, entropy=True)
    for name, value in plain.items():
        torch.testing.assert_close(results[name], value)


@pytest.mark.parametrize("row_chunk", [2048, 64, 8])
def test_error_of_a_bf16_weight_gradient_does_not_grow_with_the_number_of_chunks(
    row_chunk: int, set_tiles: SetTiles, backend: str
) -> None:
    """One rounding to bf16 costs at most 2^-9 of a value, and the rounding of dlogits to bf16, where products want it, up to as
    much again. Rounding each chunk's part would cost 1e-2 at 256 chunks."""
    if backend == "triton" and row_chunk != 2048:
        pytest.skip("it has no chunks of rows")
    set_tiles(row_chunk, 2**21)
    head = random_head(2048, 16, 8, torch.bfloat16, bias=False, ignored=0)
    head.hidden += 1  # a mean that the sum over rows keeps, so that parts are small against the whole
    truth = values_and_gradients(token_stats_reference, head.double(), through=("lse",))["d_weight"]
    ours = values_and_gradients(linear_token_stats, head, through=("lse",))["d_weight"]
    assert ((ours - truth).norm() / truth.norm()).item() < 2 * 2**-9
