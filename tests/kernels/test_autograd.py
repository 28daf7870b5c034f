"""linear_token_stats as a citizen of autograd: frozen inputs, no_grad, autocast, tied weights, accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_kernels import TokenStats, linear_token_stats
from tbrm_kernels.backends import cpu, registry
from tbrm_kernels.reference import token_stats_reference
from tests.kernels.heads import DEVICE, seeded

T, V, D = 20, 50, 6
SetTiles = Callable[[int, int], None]
pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(autouse=True)
def several_tiles(set_tiles: SetTiles) -> None:
    set_tiles(8, 8 * 16)


def leaves(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = seeded(0)
    shapes = {"hidden": (T, D), "weight": (V, D), "bias": (V,)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def targets() -> Tensor:
    return torch.randint(V, (T,), generator=seeded(1))


def loss_of(stats: TokenStats | tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    logprobs, lse, entropy = stats
    assert entropy is not None
    return (logprobs * torch.linspace(-1, 1, T)).sum() + lse[::3].square().sum() + entropy.sum()


def gradients(inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    loss_of(linear_token_stats(targets=targets(), entropy=True, **inputs)).backward()
    return {name: tensor.grad for name, tensor in inputs.items()}


@pytest.mark.parametrize("frozen", [["weight"], ["hidden"], ["bias"], ["weight", "bias"], ["hidden", "bias"]], ids=str)
def test_frozen_inputs_get_no_gradient_and_the_others_the_same_one(frozen: list[str]) -> None:
    expected = gradients(leaves())
    inputs = leaves()
    for name in frozen:
        inputs[name].requires_grad_(False)
    for name, grad in gradients(inputs).items():
        if name in frozen:
            assert grad is None
        else:
            assert grad is not None
            assert torch.equal(grad, expected[name])


def test_no_grad_gives_the_same_numbers_and_saves_nothing() -> None:
    inputs = leaves()
    expected = linear_token_stats(targets=targets(), entropy=True, **inputs)
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        stats = linear_token_stats(targets=targets(), entropy=True, **inputs)
    assert not saved
    for value, wanted in zip(stats, expected, strict=True):
        assert not value.requires_grad
        assert torch.equal(value, wanted)


def test_a_loss_that_leaves_the_statistics_out_gives_zero_or_no_gradient() -> None:
    inputs = leaves()
    stats = linear_token_stats(targets=targets(), **inputs)
    (stats.logprobs.detach().sum() + inputs["hidden"].sum()).backward()
    assert inputs["weight"].grad is None
    assert torch.equal(inputs["hidden"].grad, torch.ones(T, D))


def test_two_backward_passes_over_one_graph() -> None:
    inputs = leaves()
    loss = loss_of(linear_token_stats(targets=targets(), entropy=True, **inputs))
    loss.backward(retain_graph=True)
    once = inputs["weight"].grad.clone()
    loss.backward()
    assert torch.equal(inputs["weight"].grad, 2 * once)


def test_second_derivatives_are_refused_and_not_silently_wrong() -> None:
    inputs = leaves()
    loss = loss_of(linear_token_stats(targets=targets(), entropy=True, **inputs))
    (grad,) = torch.autograd.grad(loss, inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_log_probs_may_be_changed_in_place() -> None:
    """The backward pass reads what it saved and never its outputs, save for the entropy."""
    expected, inputs = leaves(), leaves()
    (3 * linear_token_stats(targets=targets(), **expected).logprobs).sum().backward()
    linear_token_stats(targets=targets(), **inputs).logprobs.mul_(3).sum().backward()
    torch.testing.assert_close(inputs["weight"].grad, expected["weight"].grad)


def test_a_weight_changed_in_place_before_backward_is_an_error() -> None:
    inputs = leaves()
    loss = loss_of(linear_token_stats(targets=targets(), entropy=True, **inputs))
    with torch.no_grad():
        inputs["weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_embedding_collects_both_gradients() -> None:
    """The weight is the embedding too, so that it is used twice in one graph."""
    grads = []
    for function in (linear_token_stats, token_stats_reference):
        weight = leaves()["weight"].detach().requires_grad_()
        tokens = targets()
        hidden = torch.tanh(weight[tokens.roll(1)])
        loss_of(function(hidden, weight, tokens, entropy=True)).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [[T], [7, 13], [1, 0, 12, 7]], ids=str)
def test_accumulated_gradients_equal_those_of_one_batch(parts: list[int]) -> None:
    whole, split = leaves(), leaves()
    linear_token_stats(targets=targets(), **whole).logprobs.sum().backward()
    for hidden, part in zip(split["hidden"].split(parts), targets().split(parts), strict=True):
        linear_token_stats(hidden, split["weight"], part, bias=split["bias"]).logprobs.sum().backward()
    for name in whole:
        torch.testing.assert_close(split[name].grad, whole[name].grad, rtol=1e-4, atol=1e-5)


def rounded(tensor: Tensor) -> Tensor:
    return tensor.detach().bfloat16().to(tensor.dtype).requires_grad_()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_rounds_hidden_and_weight_and_nothing_else(backend: str, hidden_dtype: torch.dtype) -> None:
    inputs = leaves()
    inputs["hidden"] = inputs["hidden"].detach().to(hidden_dtype).requires_grad_()
    expected = leaves() | {"hidden": rounded(inputs["hidden"].float()), "weight": rounded(inputs["weight"])}
    expected_stats = token_stats_reference(targets=targets(), entropy=True, **expected)
    loss_of(expected_stats).backward()

    multiplies_bfloat16 = (
        backend == "triton" or DEVICE.type == "cuda" or (backend == "cpu" and cpu.multiplies_bfloat16())
    )
    not_truncating = backend != "triton" or DEVICE.type == "cuda"  # as Triton's interpreter does where GPUs round
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        stats = linear_token_stats(targets=targets(), entropy=True, **inputs)
        loss_of(stats).backward()  # inside the context, which must not round the backward products
    for value, wanted in zip(stats, expected_stats, strict=True):
        assert value is not None
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    for name, tensor in inputs.items():
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        wanted = expected[name].grad
        # Products of bfloat16 round dlogits first.
        exact = tensor.dtype != torch.bfloat16 and not multiplies_bfloat16
        rounding = 2**-8 if not_truncating else 2**-7
        tolerance = (
            {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": rounding, "atol": rounding * wanted.abs().max().item()}
        )
        torch.testing.assert_close(tensor.grad.float(), wanted, **tolerance)


def test_a_backend_runs_with_autocast_off(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backward pass too, where autocast may be on in the thread that runs it."""
    seen = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            seen.append((function.__name__, torch.is_autocast_enabled(DEVICE.type)))
            return function(*args)

        return wrapper

    for name in ("token_stats_forward", "token_stats_backward"):
        module = registry._BACKENDS[backend]
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss_of(linear_token_stats(targets=targets(), entropy=True, **leaves())).backward()
    assert seen == [("token_stats_forward", False), ("token_stats_backward", False)]


def test_autocast_leaves_float64_alone() -> None:
    plain = linear_token_stats(targets=targets(), **leaves(torch.float64))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        stats = linear_token_stats(targets=targets(), **leaves(torch.float64))
    assert stats.logprobs.dtype == torch.float64
    assert torch.equal(stats.logprobs, plain.logprobs)
