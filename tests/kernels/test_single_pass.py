"""The single pass: the same loss, statistics and gradients as the definition's, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tbrm_kernels import (
    TbrmOutput,
    fused_linear_tbrm_loss,
    fused_linear_trajectory_loss,
    linear_token_stats,
    segment_sums,
)
from tbrm_kernels.backends import registry
from tests.kernels.heads import DEVICE, EXAMPLES, Head, random_head, vocabulary
from tests.kernels.packed import (
    BETA,
    CHUNKS,
    LENGTHS,
    assert_as_good_as_plain_torch,
    bounds,
    chunk_bytes,
    gradients_of,
    leaves_of,
    per_token,
    scores,
    simple_loss,
    single_pass,
)

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("tokens", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 300])
def test_loss_residuals_and_gradients(vocab: int, dtype: torch.dtype, tokens: int | None) -> None:
    head = random_head(sum(LENGTHS), vocab, 9, dtype, ignored=0)
    assert_as_good_as_plain_torch(head, LENGTHS, tokens)
    assert_as_good_as_plain_torch(head, LENGTHS, tokens, softcap=30.0, temperature=0.7, logit_scale=0.5)


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=6),
    vocab=st.integers(1, 200),
    width=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    tokens=st.none() | st.integers(1, 40),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_any_packing(
    lengths: list[int],
    vocab: int,
    width: int,
    dtype: torch.dtype,
    tokens: int | None,
    bias: bool,
    ignored: float,
    seed: int,
) -> None:
    head = random_head(sum(lengths), vocab, width, dtype, bias=bias, ignored=ignored, seed=seed)
    assert_as_good_as_plain_torch(head, lengths, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "vocab", "width"),
    [
        pytest.param([1], 300, 1, id="one token, hidden width 1"),
        pytest.param([1], 7, 63, id="one token, fewer entries than a block"),
        pytest.param([2, 1], 50257, 63, id="GPT-2's vocabulary"),
        pytest.param([5, 3], 211, 640, id="the width of Gemma 3 270M"),
    ],
)
def test_shapes(lengths: list[int], vocab: int, width: int, dtype: torch.dtype, backend: str) -> None:
    vocab = vocabulary(vocab, backend) if vocab > 10_000 else vocab
    assert_as_good_as_plain_torch(random_head(sum(lengths), vocab, width, dtype, ignored=0), lengths)


@pytest.mark.parametrize("tokens", CHUNKS)
@pytest.mark.parametrize(
    "options", [{"temperature": 1e-2}, {"temperature": 1e2}, {"softcap": 0.5, "temperature": 1e-2}], ids=str
)
def test_extreme_options(options: dict[str, float], tokens: int | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_good_as_plain_torch(random_head(sum(LENGTHS), 211, 24, dtype), LENGTHS, tokens, **options)


@pytest.mark.parametrize("tokens", CHUNKS)
def test_logits_of_ten_thousand_equal_ones_and_masked_ones(tokens: int | None) -> None:
    large = torch.tensor([1e4, -1e4, 50.0]).repeat(sum(LENGTHS) // 3)[:, None]
    head = Head(large, torch.linspace(-1, 1, 201)[:, None], None, torch.tensor([200, 0, 17]).repeat(6))
    assert_as_good_as_plain_torch(head, LENGTHS, tokens)
    equal = Head(torch.ones(18, 4), torch.ones(1000, 4), None, torch.arange(18) * 58)
    assert_as_good_as_plain_torch(equal, LENGTHS, tokens)
    masked = random_head(sum(LENGTHS), 300, 8, ignored=0)
    assert masked.bias is not None
    masked.bias[:150] = -torch.inf  # whole blocks of the vocabulary, and some entries of others
    masked.bias[200:210] = -torch.inf
    masked.targets[:] = torch.arange(250, 268)
    assert_as_good_as_plain_torch(masked, LENGTHS, tokens)


def test_a_real_vocabulary_in_several_chunks(backend: str) -> None:
    """V = 151936 (Qwen), D = 63: many blocks, and neither of them a multiple of anything."""
    head = random_head(40, vocabulary(151936, backend), 63, ignored=0)
    assert_as_good_as_plain_torch(head, [20, 5, 15], tokens=20)


@pytest.mark.parametrize("tokens", CHUNKS)
def test_values_and_sums_are_those_of_the_statistics(tokens: int | None) -> None:
    head = random_head(sum(LENGTHS), 50, 8, ignored=0)
    out = fused_linear_tbrm_loss(
        head.hidden,
        head.weight,
        head.targets,
        bounds(LENGTHS),
        bias=head.bias,
        beta=BETA,
        max_chunk_bytes=chunk_bytes(tokens, head),
        **scores(LENGTHS),
    )
    assert isinstance(out, TbrmOutput)
    stats = linear_token_stats(head.hidden, head.weight, head.targets, bias=head.bias)
    torch.testing.assert_close(out.logprob_sums, segment_sums(stats.logprobs, bounds(LENGTHS)))
    starts = bounds(LENGTHS)[:-1]
    expected = [stats.lse[start] if length else 0.0 for start, length in zip(starts, LENGTHS, strict=True)]
    torch.testing.assert_close(out.values, torch.tensor(expected))


@pytest.mark.parametrize("tokens", CHUNKS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_any_loss_of_all_statistics_is_that_of_linear_token_stats(tokens: int | None, softcap: float | None) -> None:
    head = random_head(sum(LENGTHS), 60, 8, ignored=0.3)
    leaves = leaves_of(head)
    options: dict[str, Any] = {"softcap": softcap, "temperature": 0.8, "entropy": True}
    whole = linear_token_stats(targets=head.targets, **leaves, **options)
    expected = per_token(whole, bounds(LENGTHS), 0)
    loss, stats = fused_linear_trajectory_loss(
        targets=head.targets,
        cu_seqlens=bounds(LENGTHS),
        loss_fn=per_token,
        max_chunk_bytes=chunk_bytes(tokens, head),
        **leaves,
        **options,
    )
    torch.testing.assert_close(loss, expected)
    for values, wanted in zip(stats, whole, strict=True):
        assert values is not None
        assert not values.requires_grad
        torch.testing.assert_close(values, wanted)
    wanted_gradients = gradients_of(expected, leaves)
    for name, grad in gradients_of(loss, leaves).items():
        torch.testing.assert_close(grad, wanted_gradients[name], rtol=1e-4, atol=1e-4)


def test_nan_comes_out_as_nan() -> None:
    head = random_head(sum(LENGTHS), 60, 8, ignored=0)
    head.hidden[7] = torch.nan
    results = single_pass(head, LENGTHS)
    assert results["loss"].isnan()
    assert results["residuals"].isnan().sum() == 1
    assert results["d_hidden"][7].isnan().all()
    assert results["d_weight"].isnan().any()


def test_two_runs_are_bitwise_equal() -> None:
    head = random_head(sum(LENGTHS), 3000, 40, torch.bfloat16)
    first, second = single_pass(head, LENGTHS), single_pass(head, LENGTHS)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_wider_matrices(dtype: torch.dtype) -> None:
    """They need no copy, so that what lies between the rows must not be read."""
    head = random_head(sum(LENGTHS), 300, 48, dtype)
    apart = Head(*(within_nan(matrix) for matrix in (head.hidden, head.weight)), head.bias, head.targets)
    expected = single_pass(head, LENGTHS)
    for name, value in single_pass(apart, LENGTHS).items():
        assert torch.equal(value, expected[name]), name


def within_nan(matrix: Tensor) -> Tensor:
    return torch.nn.functional.pad(matrix, (16, 32), value=torch.nan)[:, 16:-32]


def test_strided_and_transposed_inputs() -> None:
    head = random_head(sum(LENGTHS), 30, 8)
    assert head.bias is not None
    strided = Head(
        head.hidden.T.contiguous().T,
        head.weight.repeat_interleave(2, dim=1)[:, ::2],
        head.bias.repeat_interleave(3)[::3],
        head.targets.repeat_interleave(2)[::2],
    )
    expected = single_pass(head, LENGTHS)
    for name, value in single_pass(strided, LENGTHS).items():
        torch.testing.assert_close(value, expected[name])


def test_nothing_to_do() -> None:
    """No trajectories, trajectories without tokens, and tokens that are all ignored: loss and gradients are there."""
    for lengths, ignored in (([], 0.0), ([0, 0], 0.0), (LENGTHS, 1.0)):
        head = random_head(sum(lengths), 12, 4, ignored=ignored)
        leaves = leaves_of(head)
        loss, stats = fused_linear_trajectory_loss(
            targets=head.targets, cu_seqlens=bounds(lengths), loss_fn=per_token, entropy=True, **leaves
        )
        loss.backward()
        assert loss == 0
        assert stats.logprobs.shape == (sum(lengths),)
        assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves.values())


def test_impossible_arguments_are_refused() -> None:
    head = random_head(sum(LENGTHS), 12, 4)
    arguments: dict[str, Any] = {"hidden": head.hidden, "weight": head.weight, "targets": head.targets}
    with pytest.raises(ValueError, match="max_chunk_bytes is 0: it must be above 0"):
        fused_linear_trajectory_loss(
            **arguments, cu_seqlens=bounds(LENGTHS), loss_fn=per_token, entropy=True, max_chunk_bytes=0
        )
    if DEVICE.type != "cuda":  # where the device finds it, and can be asked nothing afterwards
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 18"):
            fused_linear_trajectory_loss(**arguments, cu_seqlens=bounds([5]), loss_fn=per_token, entropy=True)
    with pytest.raises(ValueError, match=r"loss_fn returned \[18\]: it must return \[\]"):
        fused_linear_trajectory_loss(**arguments, cu_seqlens=bounds(LENGTHS), loss_fn=lambda stats, *_: stats.logprobs)
    with pytest.raises(TypeError, match="loss_fn returned a float: it must return a tensor"):
        fused_linear_trajectory_loss(**arguments, cu_seqlens=bounds(LENGTHS), loss_fn=lambda *_: 0.0)
    with pytest.raises(TypeError, match="loss_fn is a Tensor: it must be a function"):
        fused_linear_trajectory_loss(**arguments, cu_seqlens=bounds(LENGTHS), loss_fn=head.hidden)
    with pytest.raises(TypeError, match=r"cu_seqlens is a list: pass a torch\.Tensor"):
        fused_linear_trajectory_loss(**arguments, cu_seqlens=[0, 18], loss_fn=per_token, entropy=True)


@pytest.mark.parametrize("name", ["ref_logprob_sums", "rewards", "ref_values"])
def test_scores_of_another_number_of_trajectories_are_refused(name: str) -> None:
    head = random_head(sum(LENGTHS), 12, 4)
    fitting = scores(LENGTHS)
    for length in (len(LENGTHS) + 1, len(LENGTHS) - 1):
        wrong = {**fitting, name: torch.zeros(length)}
        with pytest.raises(ValueError, match=rf"{name} has shape \[{length}\]: it must be \[6\]"):
            fused_linear_tbrm_loss(head.hidden, head.weight, head.targets, bounds(LENGTHS), beta=BETA, **wrong)
    with pytest.raises(TypeError, match=rf"{name} is a list: pass a torch\.Tensor"):
        wrong = {**fitting, name: [0.0] * len(LENGTHS)}
        fused_linear_tbrm_loss(head.hidden, head.weight, head.targets, bounds(LENGTHS), beta=BETA, **wrong)


class Chunks:
    """Counts the chunks of each call, and their tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        for backend in registry._BACKENDS.values():
            real = backend.Head.chunk

            def chunk(head: Any, hidden: Tensor, *rest: Any, real: Any = real) -> Any:
                self.tokens.append(len(hidden))
                return real(head, hidden, *rest)

            monkeypatch.setattr(backend.Head, "chunk", chunk)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        pytest.param(None, [18], id="as shipped"),
        pytest.param(9, [6, 9, 3], id="whole trajectories, as many as fit"),
        pytest.param(6, [6, 6, 3, 3], id="one in pieces"),
        pytest.param(14, [6, 12], id="no chunk ends within a trajectory"),
    ],
)
def test_chunks_hold_whole_trajectories_within_the_budget(
    tokens: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is in one chunk: its logits are computed once, or if its trajectory does not fit, once more."""
    head = random_head(sum(LENGTHS), 60, 8, ignored=0)
    chunks = Chunks(monkeypatch)
    simple_loss(leaves_of(head), head, max_chunk_bytes=chunk_bytes(tokens, head))
    assert chunks.tokens == expected
