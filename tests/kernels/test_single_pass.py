"""The single pass: the same loss, statistics and gradients as the definition's, whatever the chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tbrm_kernels import (
    TbrmOutput,
    TokenStats,
    fused_linear_tbrm_loss,
    fused_linear_trajectory_loss,
    linear_token_stats,
    segment_sums,
    trajectory_residual,
)
from tbrm_kernels.backends import registry
from tbrm_kernels.reference import token_stats_reference, trajectory_residual_reference
from tests.kernels.heads import DEVICE, Head, luck, multiplies_bfloat16, plain_bfloat16, random_head, rounding, seeded

pytestmark = pytest.mark.usefixtures("backend")

BETA = 0.5
LENGTHS = [5, 0, 1, 9, 3, 0]
"""Trajectories of length 0 (the last among them) and 1, and one that is longer than the others together."""
CHUNKS = [
    pytest.param(None, id="as shipped"),
    pytest.param(6, id="one trajectory does not fit"),
    pytest.param(1, id="none fits"),
    pytest.param(18, id="all fit"),
]


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def chunk_bytes(tokens: int | None, head: Head) -> int | None:
    """The bytes in which so many tokens fit."""
    if tokens is None:
        return None
    backend = registry.select("auto", DEVICE, head.hidden.dtype)
    itemsize = 8 if head.hidden.dtype == torch.float64 else 4
    if backend is not registry._BACKENDS["torch"] and multiplies_bfloat16(head):
        itemsize = 2
    return tokens * len(head.weight) * itemsize


def keeps_exps(head: Head) -> bool:
    return "triton" in registry._BACKENDS and head.hidden.dtype == torch.bfloat16


def scores(lengths: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = seeded(2)
    names = ("ref_logprob_sums", "rewards", "ref_values")
    return {name: torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(dtype) for name in names}


def leaves_of(head: Head) -> dict[str, Tensor]:
    named = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    return {name: leaf.detach().requires_grad_() for name, leaf in named.items() if leaf is not None}


def definition(
    head: Head, lengths: list[int], stats_of: Callable[..., Any] = token_stats_reference, **options: Any
) -> dict[str, Tensor]:
    """Loss, residuals and gradients by the definition, through the statistics that `stats_of` gives."""
    leaves = leaves_of(head)
    logprobs, lse, _ = stats_of(targets=head.targets, **leaves, **options)
    residuals = trajectory_residual_reference(
        logprobs, lse, bounds(lengths), beta=BETA, **scores(lengths, logprobs.dtype)
    )
    loss = residuals.square().sum() / max(1, len(lengths))
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    else:  # there is no action
        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves.values())
    results = {"loss": loss.detach(), "residuals": residuals.detach()}
    return results | {f"d_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def single_pass(head: Head, lengths: list[int], tokens: int | None = None, **options: Any) -> dict[str, Tensor]:
    leaves = leaves_of(head)
    dtype = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
    out = fused_linear_tbrm_loss(
        targets=head.targets,
        cu_seqlens=bounds(lengths),
        beta=BETA,
        max_chunk_bytes=chunk_bytes(tokens, head),
        **scores(lengths, dtype),
        **leaves,
        **options,
    )
    out.loss.backward()
    results = {"loss": out.loss.detach(), "residuals": out.residuals}
    return results | {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_as_good_as_plain_torch(head: Head, lengths: list[int], tokens: int | None = None, **options: Any) -> None:
    truth = definition(head.double(), lengths, **options)
    plain = definition(head, lengths, **options)
    if multiplies_bfloat16(head):
        rounded = definition(head, lengths, plain_bfloat16, **options)
        plain |= {name: value for name, value in rounded.items() if name.startswith("d_")}
    ours = single_pass(head, lengths, tokens, **options)
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        if true.numel() == 0:
            continue
        eps = 1e-13 if head.hidden.dtype == torch.float64 else torch.finfo(torch.float32).eps
        if name.startswith("d_"):
            eps += rounding(head) / 64
        allowed = luck(head) * (plain[name] - true).abs().max() + 64 * eps * true.abs().max().clamp(min=1)
        assert ours[name].dtype == plain[name].dtype
        assert (ours[name] - true).abs().max() <= allowed, name


@pytest.mark.parametrize("tokens", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 300])
def test_loss_residuals_and_gradients(vocab: int, dtype: torch.dtype, tokens: int | None) -> None:
    head = random_head(sum(LENGTHS), vocab, 9, dtype, ignored=0)
    assert_as_good_as_plain_torch(head, LENGTHS, tokens)
    assert_as_good_as_plain_torch(head, LENGTHS, tokens, softcap=30.0, temperature=0.7, logit_scale=0.5)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
def test_shapes(lengths: list[int], vocab: int, width: int, dtype: torch.dtype) -> None:
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


def test_a_real_vocabulary_in_several_chunks() -> None:
    """V = 151936 (Qwen), D = 63: many blocks, and neither of them a multiple of anything."""
    head = random_head(40, 151936, 63, ignored=0)
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


def per_token(stats: TokenStats, cu_seqlens: Tensor, first: int) -> Tensor:
    """A loss that uses every output, with a weight of its own for every trajectory and token."""
    assert stats.entropy is not None
    trajectory = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff()) + first
    place = torch.arange(len(stats.lse)) - cu_seqlens[trajectory - first]
    weight = (trajectory + 1) * torch.cos(place.to(stats.lse.dtype))
    return (weight * stats.logprobs + stats.lse.square() * weight.sin() - stats.entropy * weight).sum()


def gradients_of(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


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


def simple_loss(leaves: dict[str, Tensor], head: Head, **options: Any) -> Tensor:
    return fused_linear_trajectory_loss(
        targets=head.targets, cu_seqlens=bounds(LENGTHS), loss_fn=per_token, entropy=True, **leaves, **options
    )[0]


@pytest.mark.parametrize("frozen", [["weight"], ["hidden"], ["bias"], ["weight", "bias"], ["hidden", "bias"]], ids=str)
@pytest.mark.parametrize("tokens", [None, 1])
def test_frozen_inputs_get_no_gradient_and_the_others_the_same_one(frozen: list[str], tokens: int | None) -> None:
    head = random_head(sum(LENGTHS), 60, 8)
    expected = gradients_of(simple_loss(leaves := leaves_of(head), head), leaves)
    leaves = leaves_of(head)
    for name in frozen:
        leaves[name].requires_grad_(False)
    simple_loss(leaves, head, max_chunk_bytes=chunk_bytes(tokens, head)).backward()
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[name])


def test_without_gradients_none_is_computed_and_the_loss_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    head = random_head(sum(LENGTHS), 60, 8)
    expected = simple_loss(leaves_of(head), head)
    for backend in registry._BACKENDS.values():
        monkeypatch.setattr(backend.Head, "chunk", None)  # nothing is to be kept for a backward pass
    with torch.no_grad():
        loss = simple_loss(leaves_of(head), head)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    assert torch.equal(simple_loss({k: v.detach() for k, v in leaves_of(head).items()}, head), loss)


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5])
def test_the_incoming_gradient_scales_all(factor: float) -> None:
    head = random_head(sum(LENGTHS), 60, 8)
    expected = gradients_of(simple_loss(leaves := leaves_of(head), head), leaves)
    scaled = gradients_of(simple_loss(leaves := leaves_of(head), head) * factor, leaves)
    for name, grad in scaled.items():
        torch.testing.assert_close(grad, expected[name] * factor)


def test_a_factor_within_the_loss_rounds_16_bit_gradients_no_more_than_once() -> None:
    head = random_head(sum(LENGTHS), 300, 32, torch.bfloat16)

    def gradient(loss_of: Callable[..., Tensor], weight: Tensor) -> Tensor:
        loss_of(head.hidden.to(weight.dtype), weight.requires_grad_()).backward()
        assert weight.grad is not None
        return weight.grad.float()

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        third = lambda stats, *_: stats.logprobs.sum() / 3  # noqa: E731
        return fused_linear_trajectory_loss(hidden, weight, head.targets, bounds(LENGTHS), third)[0]

    def recomputed(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_token_stats(hidden, weight, head.targets).logprobs.sum() / 3

    exact = gradient(recomputed, head.weight.float())
    errors = [(gradient(f, head.weight.clone()) - exact).norm() for f in (fused, recomputed)]
    # Triton's single pass rounds two operands, the exponentials and the scaled hidden states, in place of one.
    assert 0 < errors[0] <= (2 if keeps_exps(head) else 1.1) * errors[1]


def test_a_second_backward_pass_is_refused() -> None:
    head = random_head(sum(LENGTHS), 60, 8)
    loss = simple_loss(leaves_of(head), head)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out by an earlier backward pass"):
        loss.backward()


def assert_near(ours: Tensor | None, wanted: Tensor | None) -> None:
    assert ours is not None and wanted is not None
    assert (ours - wanted).norm() <= 1e-5 * wanted.norm()


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    head = random_head(sum(LENGTHS), 60, 8)
    leaves = leaves_of(head)
    simple_loss(leaves, head).backward()
    split = leaves_of(head)
    cu = bounds(LENGTHS).tolist()
    for first, last in ((0, 2), (2, 4), (4, 6)):
        tokens = slice(cu[first], cu[last])

        def shifted(stats: TokenStats, cu_seqlens: Tensor, number: int, first: int = first) -> Tensor:
            return per_token(stats, cu_seqlens, number + first)

        loss, _ = fused_linear_trajectory_loss(
            split["hidden"][tokens],
            split["weight"],
            head.targets[tokens],
            bounds(LENGTHS[first:last]),
            shifted,
            bias=split["bias"],
            entropy=True,
        )
        loss.backward()
    for name, leaf in leaves.items():
        assert_near(split[name].grad, leaf.grad)


def test_tied_embedding_collects_both_gradients() -> None:
    """The weight is the embedding too, so that it is used twice in one graph."""
    head = random_head(sum(LENGTHS), 60, 8, bias=False, ignored=0)
    grads = []
    for use in ("single pass", "definition"):
        weight = head.weight.clone().requires_grad_()
        hidden = torch.tanh(weight[head.targets.roll(1)])
        if use == "single pass":
            loss = simple_loss({"hidden": hidden, "weight": weight}, head)
        else:
            stats = token_stats_reference(hidden, weight, head.targets, entropy=True)
            loss = per_token(TokenStats(*stats), bounds(LENGTHS), 0)
        loss.backward()
        grads.append(weight.grad)
    assert_near(*grads)


def test_lora_on_the_head_trains_through_the_merged_weight() -> None:
    head = random_head(sum(LENGTHS), 60, 8, bias=False, ignored=0)
    grads = []
    for use in ("single pass", "definition"):
        generator = seeded(3)
        a = torch.randn(2, 8, generator=generator).requires_grad_()
        b = torch.randn(60, 2, generator=generator).requires_grad_()
        merged = head.weight + b @ a
        if use == "single pass":
            loss = simple_loss({"hidden": head.hidden, "weight": merged}, head)
        else:
            stats = token_stats_reference(head.hidden, merged, head.targets, entropy=True)
            loss = per_token(TokenStats(*stats), bounds(LENGTHS), 0)
        loss.backward()
        grads.append((a.grad, b.grad))
    for ours, wanted in zip(*grads, strict=True):
        assert_near(ours, wanted)


def test_autocast_is_that_of_linear_token_stats() -> None:
    head = random_head(sum(LENGTHS), 60, 8)
    results = []
    for fused in (True, False):
        leaves = leaves_of(head)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            if fused:
                loss = simple_loss(leaves, head)
            else:
                stats = linear_token_stats(targets=head.targets, entropy=True, **leaves)
                loss = per_token(stats, bounds(LENGTHS), 0)
            loss.backward()
        assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves.values())
        results.append((loss.detach(), [leaf.grad for leaf in leaves.values()]))
    tolerance = 2**-6 if "triton" in registry._BACKENDS else 1e-5  # it rounds other operands in the single pass
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for ours, other in zip(results[0][1], results[1][1], strict=True):
        assert (ours - other).norm() <= tolerance * other.norm()


def any_loss(hidden: Tensor, weight: Tensor, head: Head) -> Tensor:
    return simple_loss({"hidden": hidden, "weight": weight}, head)


def tbrm_loss(hidden: Tensor, weight: Tensor, head: Head) -> Tensor:
    out = fused_linear_tbrm_loss(hidden, weight, head.targets, bounds(LENGTHS), beta=BETA, **scores(LENGTHS))
    return out.loss + out.residuals.sum() + out.values.sum()


def loss_of_statistics(hidden: Tensor, weight: Tensor, head: Head) -> Tensor:
    stats = linear_token_stats(hidden, weight, head.targets)
    given = scores(LENGTHS)
    sums, rewards = given["ref_logprob_sums"], given["rewards"]
    return trajectory_residual(stats.logprobs, stats.lse, bounds(LENGTHS), sums, rewards, BETA).square().sum()


@pytest.mark.parametrize("loss_of", [any_loss, tbrm_loss, loss_of_statistics])
def test_inside_a_compiled_model(loss_of: Callable[..., Tensor]) -> None:
    head = random_head(sum(LENGTHS), 60, 8, bias=False)

    def model(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss_of(hidden.tanh(), weight, head) * 2

    results = []
    for function in (model, torch.compile(model, backend="aot_eager")):
        leaves = leaves_of(head)
        loss = function(leaves["hidden"], leaves["weight"])
        loss.backward()
        results.append((loss.detach(), [leaf.grad for leaf in leaves.values()]))
    torch.testing.assert_close(results[0], results[1])


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


def test_a_loss_that_leaves_the_statistics_out_gives_zero_gradients() -> None:
    head = random_head(sum(LENGTHS), 12, 4)
    leaves = leaves_of(head)
    loss, _ = fused_linear_trajectory_loss(
        targets=head.targets, cu_seqlens=bounds(LENGTHS), loss_fn=lambda *_: torch.tensor(3.0), **leaves
    )
    loss.backward()
    assert all(not leaf.grad.any() for leaf in leaves.values())


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


def test_an_entropy_that_the_loss_leaves_out_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for backend in registry._BACKENDS.values():
        real = backend.Head.chunk

        def chunk(head: Any, hidden: Tensor, targets: Tensor, real: Any = real) -> Any:
            made = real(head, hidden, targets)
            backward = made.backward
            made.backward = lambda grads, *rest, **last: (seen.append(grads.entropy), backward(grads, *rest, **last))
            return made

        monkeypatch.setattr(backend.Head, "chunk", chunk)
    head = random_head(sum(LENGTHS), 60, 8)
    arguments = {**leaves_of(head), "targets": head.targets, "cu_seqlens": bounds(LENGTHS), "entropy": True}
    fused_linear_trajectory_loss(**arguments, loss_fn=lambda stats, *_: stats.logprobs.sum())
    assert seen == [None]
    fused_linear_trajectory_loss(**arguments, loss_fn=lambda stats, *_: (stats.logprobs + stats.entropy).sum())
    assert seen[1] is not None


class Chunks:
    """Counts the chunks of each call, and their tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        for backend in registry._BACKENDS.values():
            real = backend.Head.chunk

            def chunk(head: Any, hidden: Tensor, targets: Tensor, real: Any = real) -> Any:
                self.tokens.append(len(hidden))
                return real(head, hidden, targets)

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
