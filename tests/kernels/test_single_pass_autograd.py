"""The single pass among other operations: what is frozen, scaled, accumulated, tied, adapted, cast and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_kernels import (
    TokenStats,
    fused_linear_tbrm_loss,
    fused_linear_trajectory_loss,
    linear_token_stats,
    trajectory_residual,
)
from tbrm_kernels.backends import registry
from tbrm_kernels.reference import token_stats_reference
from tests.kernels.heads import DEVICE, Head, random_head, seeded
from tests.kernels.packed import (
    BETA,
    LENGTHS,
    assert_near,
    bounds,
    chunk_bytes,
    gradients_of,
    keeps_exps,
    leaves_of,
    per_token,
    scores,
    simple_loss,
)

pytestmark = pytest.mark.usefixtures("backend")


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


@pytest.mark.slow
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


def test_a_loss_that_leaves_the_statistics_out_gives_zero_gradients() -> None:
    head = random_head(sum(LENGTHS), 12, 4)
    leaves = leaves_of(head)
    loss, _ = fused_linear_trajectory_loss(
        targets=head.targets, cu_seqlens=bounds(LENGTHS), loss_fn=lambda *_: torch.tensor(3.0), **leaves
    )
    loss.backward()
    assert all(not leaf.grad.any() for leaf in leaves.values())


def test_an_entropy_that_the_loss_leaves_out_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for backend in registry._BACKENDS.values():
        real = backend.Head.chunk

        def chunk(head: Any, *arguments: Any, real: Any = real) -> Any:
            made = real(head, *arguments)
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
