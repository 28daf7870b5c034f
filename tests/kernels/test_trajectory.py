"""Residuals of packed trajectories, against the definition and against what the theory says they are."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tbrm_kernels import linear_token_stats, segment_sums, trajectory_residual
from tbrm_kernels.backends import registry
from tbrm_kernels.reference import trajectory_residual_reference
from tests.kernels.heads import DEVICE, seeded

pytestmark = pytest.mark.usefixtures("backend")


def packed(lengths: list[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """The arguments of trajectory_residual for random trajectories of the given lengths."""
    generator = seeded(seed)
    tokens, n = sum(lengths), len(lengths)
    sizes = {"logprobs": tokens, "lse": tokens, "ref_logprob_sums": n, "rewards": n, "ref_values": n}
    tensors = {name: torch.randn(size, generator=generator, dtype=dtype) for name, size in sizes.items()}
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {**tensors, "cu_seqlens": cu_seqlens, "beta": 0.05}


def residual_and_gradients(function: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = batch["logprobs"].detach().requires_grad_()
    lse = batch["lse"].detach().requires_grad_()
    residual = function(**batch | {"logprobs": logprobs, "lse": lse})
    if residual.requires_grad:
        residual.square().sum().backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (logprobs, lse)]
    return residual.detach(), grads[0], grads[1]


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    calibrated=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_definition(
    lengths: list[int], dtype: torch.dtype, index_dtype: torch.dtype, calibrated: bool, seed: int
) -> None:
    """Trajectories of every small length, 0 and 1 among them, anywhere in the batch; and no trajectory at all."""
    batch = packed(lengths, dtype, seed)
    batch["cu_seqlens"] = batch["cu_seqlens"].to(index_dtype)
    if not calibrated:
        del batch["ref_values"]
    ours = residual_and_gradients(trajectory_residual, batch)
    expected = residual_and_gradients(trajectory_residual_reference, batch)
    for value, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_by_hand() -> None:
    residual = trajectory_residual(
        logprobs=torch.tensor([-1.0, -2.0, -4.0]),
        lse=torch.tensor([10.0, 99.0, 20.0]),  # only the first of each trajectory counts
        cu_seqlens=torch.tensor([0, 2, 3]),
        ref_logprob_sums=torch.tensor([-2.5, -5.0]),
        rewards=torch.tensor([1.0, 0.0]),
        beta=0.5,
    )
    assert residual.tolist() == [10 - 3 + 2.5 - 2, 20 - 4 + 5]


@pytest.mark.parametrize("function", [trajectory_residual, trajectory_residual_reference])
def test_gradcheck(function: Any) -> None:
    batch = packed([3, 0, 1, 2])
    logprobs, lse = (batch.pop(name).requires_grad_() for name in ("logprobs", "lse"))
    assert torch.autograd.gradcheck(lambda *leaves: function(*leaves, **batch), (logprobs, lse))


def test_the_gradient_is_twice_the_residual_per_token_and_on_the_first_value() -> None:
    residual, d_logprobs, d_lse = residual_and_gradients(trajectory_residual, packed([2, 0, 3]))
    torch.testing.assert_close(d_logprobs, 2 * residual[[0, 0, 2, 2, 2]])
    torch.testing.assert_close(d_lse, 2 * residual[[0, 0, 2, 2, 2]] * torch.tensor([1, 0, 1, 0, 0]))


@pytest.mark.parametrize("lengths", [[0, 2], [2, 0], [2, 0, 1], [0, 0], [0]], ids=str)
def test_an_empty_trajectory_has_residual_zero_and_no_gradient(lengths: list[int]) -> None:
    """Whatever its reward, and whatever stands next to it."""
    batch = packed(lengths)
    batch["lse"][:] = torch.nan
    batch["rewards"][:] = torch.inf
    residual, *_ = residual_and_gradients(trajectory_residual, batch)
    empty = torch.tensor(lengths) == 0
    assert (residual[empty] == 0).all()
    assert residual[~empty].isnan().all()

    batch = packed(lengths)
    rewards = batch["rewards"].requires_grad_()
    trajectory_residual(**batch).sum().backward()
    assert torch.equal(rewards.grad, torch.where(empty, 0.0, -1 / batch["beta"]).double())


def test_packing_changes_nothing_and_trajectories_do_not_touch() -> None:
    batch = packed([4, 3])
    together = trajectory_residual(**batch)
    for i, tokens in enumerate([slice(0, 4), slice(4, 7)]):
        alone = {name: batch[name][i : i + 1] for name in ("ref_logprob_sums", "rewards", "ref_values")}
        alone |= {name: batch[name][tokens] for name in ("logprobs", "lse")}
        cu_seqlens = torch.tensor([0, tokens.stop - tokens.start])
        assert trajectory_residual(**alone, cu_seqlens=cu_seqlens, beta=batch["beta"]) == together[i]

    batch["logprobs"][4:], batch["lse"][4:] = torch.nan, torch.nan
    assert trajectory_residual(**batch)[0] == together[0]


def test_the_soft_optimal_policy_has_residual_zero_on_every_trajectory() -> None:
    """Two steps, 3 actions; logits built backwards by Q = r / beta + log pi_ref + V(next), with V(end) = 0."""
    beta, actions = 0.3, 3
    generator = seeded(0)
    reward_1, reward_2 = torch.randn(2, actions, actions, generator=generator, dtype=torch.float64)
    reward_1 = reward_1[0]
    ref_1, ref_2 = torch.randn(2, actions, actions, generator=generator, dtype=torch.float64).log_softmax(-1)
    ref_1 = ref_1[0]
    q_2 = reward_2 / beta + ref_2  # a row for each first action
    q_1 = reward_1 / beta + ref_1 + q_2.logsumexp(-1)

    first, second = torch.cartesian_prod(torch.arange(actions), torch.arange(actions)).T
    targets = torch.stack([first, second], dim=1).flatten()
    states = torch.stack([torch.zeros_like(first), 1 + first], dim=1).flatten()
    q = torch.cat([q_1[None], q_2])
    stats = linear_token_stats(torch.eye(1 + actions, dtype=torch.float64)[states], q.T, targets)
    residual = trajectory_residual(
        stats.logprobs,
        stats.lse,
        torch.arange(0, 2 * len(first) + 1, 2),
        ref_1[first] + ref_2[first, second],
        reward_1[first] + reward_2[first, second],
        beta,
    )
    torch.testing.assert_close(residual, torch.zeros_like(residual))


def test_policy_and_reference_cancel_exactly_where_they_agree() -> None:
    batch = packed([1000, 1, 4000], torch.float32)
    batch["ref_logprob_sums"] = segment_sums(batch["logprobs"], batch["cu_seqlens"])
    batch["ref_values"] = batch["lse"][batch["cu_seqlens"][:-1]]
    batch["rewards"].zero_()
    assert not trajectory_residual(**batch).any()


def test_long_sums_lose_nothing_but_one_rounding() -> None:
    values = torch.full((100_000,), -0.1)
    cu_seqlens = torch.tensor([0, 100_000], dtype=torch.int32)
    assert segment_sums(values, cu_seqlens).item() == values.double().sum().float().item()


def test_segment_sums_are_differentiable_and_take_strided_inputs() -> None:
    values = torch.randn(10, dtype=torch.float64)[::2].requires_grad_()
    cu_seqlens = torch.tensor([0, 9, 2, 9, 2, 9, 5])[::2]
    torch.testing.assert_close(
        segment_sums(values, cu_seqlens), torch.stack([values[:2].sum(), values[2:2].sum(), values[2:].sum()])
    )
    assert torch.autograd.gradcheck(lambda x: segment_sums(x, cu_seqlens), values)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, r"beta is 0\.0"),
        ({"beta": float("nan")}, ValueError, "beta is nan"),
        ({"cu_seqlens": torch.tensor([0.0, 2.0, 5.0])}, TypeError, "cu_seqlens is .*float32.*int32 or int64"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, TypeError, r"cu_seqlens is \[0\]"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 5], device="meta")},
            ValueError,
            "cu_seqlens is on meta and logprobs on c",
        ),
        ({"logprobs": torch.zeros(5, dtype=torch.int64)}, TypeError, "logprobs is .*int64"),
        ({"logprobs": torch.zeros(1, 5)}, TypeError, r"logprobs is \[1, 5\]"),
        ({"lse": torch.zeros(2, dtype=torch.float64)}, ValueError, r"lse has shape \[2\].*\[5\]"),
        ({"lse": torch.zeros(5)}, TypeError, "lse is torch.float32"),
        ({"rewards": torch.zeros(3, dtype=torch.float64)}, ValueError, r"rewards has shape \[3\].*\[2\]"),
        ({"rewards": torch.zeros(2, dtype=torch.int64)}, TypeError, "rewards is torch.int64"),
        ({"ref_values": torch.zeros(1, dtype=torch.float64)}, ValueError, r"ref_values has shape \[1\]"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    changed = {name: x.to(DEVICE) if _on_cpu(x) else x for name, x in changed.items()}
    with pytest.raises(error, match=message):
        trajectory_residual(**packed([2, 3]) | changed)


def _on_cpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU finds it, and can be asked nothing afterwards")
@pytest.mark.parametrize(
    ("bounds", "message"), [([0, 2, 4], "T = 5"), ([1, 2, 5], "from 0"), ([0, 6, 5], "rise")], ids=str
)
def test_bounds_that_do_not_divide_the_tokens_are_named(bounds: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"cu_seqlens is {re.escape(str(bounds))}.*{message}"):
        trajectory_residual(**packed([2, 3]) | {"cu_seqlens": torch.tensor(bounds)})


def test_one_launch_forward_and_one_backward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where launches are what a computation of this size costs."""
    if backend != "triton":
        pytest.skip("counts Triton's launches")
    from tbrm_kernels.backends.triton import segments

    launched = []
    for name in ("residual_kernel", "residual_grad_kernel"):
        monkeypatch.setattr(segments, name, LaunchCounter(getattr(segments, name), launched))
    batch = packed([3, 0, 2000, 1], torch.float32)
    ours = residual_and_gradients(trajectory_residual, batch)
    assert launched == ["residual_kernel", "residual_grad_kernel"]
    monkeypatch.setattr(registry, "_BACKENDS", {"torch": registry._BACKENDS["torch"]})
    for value, wanted in zip(ours, residual_and_gradients(trajectory_residual, batch), strict=True):
        torch.testing.assert_close(value, wanted)


class LaunchCounter:
    def __init__(self, kernel: Any, launched: list[str]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.kernel.fn.__name__)
        return self.kernel[grid]
