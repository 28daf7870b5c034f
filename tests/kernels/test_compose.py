"""The head among torch's other machinery: compiled as one graph, traced without data, checkpointed, and through torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tbrm_kernels import (
    TokenStats,
    checks,
    fused_linear_tbrm_loss,
    fused_linear_trajectory_loss,
    linear_token_stats,
    trajectory,
    trajectory_loss,
)
from tbrm_kernels.backends import registry
from tests.kernels.heads import DEVICE, Head, random_head
from tests.kernels.packed import LENGTHS, bounds, leaves_of, per_token

pytestmark = pytest.mark.usefixtures("backend")
T, V, D = sum(LENGTHS), 60, 8
BOUNDS = bounds(LENGTHS)
LossOf = Callable[..., Tensor]


def packing_on(device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(LENGTHS)], device=device)


def of_statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    temperature = torch.linspace(0.5, 2.0, T, device=hidden.device)
    stats = linear_token_stats(hidden, weight, targets, bias=bias, entropy=True, softcap=9.0, temperature=temperature)
    assert stats.entropy is not None
    return (stats.logprobs.square() + stats.lse - stats.entropy).sum()


def of_tbrm(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    scores = torch.linspace(-9, -1, len(LENGTHS), device=hidden.device)
    packing = packing_on(hidden.device)
    out = fused_linear_tbrm_loss(
        hidden, weight, targets, packing, scores, scores + 5, beta=0.5, bias=bias, temperature=0.7
    )
    return out.loss + 0 * (out.residuals.sum() + out.values.sum() + out.logprob_sums.sum())


def of_any_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    def loss_fn(stats: TokenStats, cu_seqlens: Tensor, first: int) -> Tensor:
        assert stats.entropy is not None
        return (stats.logprobs.square() + stats.lse - stats.entropy).sum()

    packing = packing_on(hidden.device)
    return fused_linear_trajectory_loss(hidden, weight, targets, packing, loss_fn, bias=bias, entropy=True)[0]


OPERATORS = [of_statistics, of_tbrm]
LOSSES = [*OPERATORS, of_any_loss]


def model(loss_of: LossOf, head: Head) -> LossOf:
    """With something before and behind the head, so that its gradients go on and its own is not 1."""
    return lambda hidden, weight, bias: 3 * loss_of(hidden.tanh(), weight, bias, head.targets).square()


def gradients(function: LossOf, head: Head) -> list[Tensor]:
    leaves = list(leaves_of(head).values())
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("loss_of", OPERATORS)
def test_one_graph_under_torch_compile(loss_of: LossOf) -> None:
    head = random_head(T, V, D)
    compiled = torch.compile(model(loss_of, head), backend="aot_eager", fullgraph=True)
    expected = gradients(model(loss_of, head), head)
    for ours, wanted in zip(gradients(compiled, head), expected, strict=True):
        assert torch.equal(ours, wanted)
    with pytest.raises(ValueError, match=r"targets\[0\] is 60"):  # values are looked at when there are some
        gradients(
            torch.compile(model(loss_of, wrong := random_head(T, V, D)), backend="aot_eager"), out_of_range(wrong)
        )


def out_of_range(head: Head) -> Head:
    head.targets[0] = V
    return head


@pytest.mark.parametrize("loss_of", OPERATORS)
@pytest.mark.parametrize("frozen", [(), ("weight", "bias")], ids=["", "frozen head"])
def test_one_graph_computes_what_is_needed(loss_of: LossOf, frozen: tuple[str, ...]) -> None:
    head = random_head(T, V, D)
    found = []
    for compiled in (False, True):
        leaves = leaves_of(head)
        for name in frozen:
            leaves[name].requires_grad_(False)
        function = model(loss_of, head)
        (torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function)(
            *leaves.values()
        ).backward()
        found.append(leaves)
    for name in found[0]:
        ours, wanted = found[1][name].grad, found[0][name].grad
        assert (ours is None and wanted is None) if name in frozen else torch.equal(ours, wanted)


@pytest.mark.parametrize("loss_of", LOSSES)
def test_shapes_alone_on_meta_and_fake_tensors(loss_of: LossOf) -> None:
    head = random_head(T, V, D)
    tensors = [head.hidden, head.weight, head.bias, head.targets]
    mode = FakeTensorMode()
    for described in ([x.to("meta") for x in tensors], [mode.from_tensor(x) for x in tensors]):
        leaves = [x.detach().requires_grad_() for x in described[:3]]
        with mode if described[0].device == DEVICE else nullcontext():
            loss = loss_of(*leaves, described[3])
            loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32
        assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("loss_of", LOSSES)
def test_under_activation_checkpointing(loss_of: LossOf) -> None:
    head = random_head(T, V, D)
    plain = model(loss_of, head)
    expected = gradients(plain, head)
    ours = gradients(lambda *leaves: checkpoint(plain, *leaves, use_reentrant=False), head)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("loss_of", LOSSES)
def test_torch_func(loss_of: LossOf) -> None:
    head = random_head(T, V, D)
    function = model(loss_of, head)
    _, *expected = gradients(function, head)
    leaves = [leaf.detach() for leaf in leaves_of(head).values()]
    for ours, wanted in zip(torch.func.grad(function, (0, 1, 2))(*leaves), expected, strict=True):
        assert torch.equal(ours, wanted)
    assert torch.equal(torch.func.grad(function, 1)(*leaves), expected[1])
    loss, pull = torch.func.vjp(function, *leaves)
    for _ in range(2):  # it may be called again
        assert all(torch.equal(a, b) for a, b in zip(pull(torch.ones_like(loss)), expected, strict=True))


@pytest.mark.parametrize("loss_of", LOSSES)
def test_functional_call(loss_of: LossOf) -> None:
    head = random_head(T, V, D)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(D, V)

        def forward(self, hidden: Tensor) -> Tensor:
            return loss_of(hidden, self.head.weight, self.head.bias, head.targets)

    module = Model()
    parameters = {"head.weight": head.weight, "head.bias": head.bias}
    grads = torch.func.grad(lambda p: torch.func.functional_call(module, p, (head.hidden,)))(parameters)
    _, _, *expected = gradients(lambda *leaves: loss_of(*leaves, head.targets), head)
    assert torch.equal(grads["head.weight"], expected[0]) and torch.equal(grads["head.bias"], expected[1])


@pytest.mark.parametrize("loss_of", LOSSES)
def test_a_second_derivative_is_refused_and_never_0(loss_of: LossOf) -> None:
    """Also where the upstream gradient is a constant, which a graph of the gradient alone would not connect to anything."""
    head = random_head(T, V, D)
    leaves = list(leaves_of(head).values())
    (grad,) = torch.autograd.grad(loss_of(leaves[0].tanh(), *leaves[1:], head.targets), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*once_differentiable"):
        grad.sum().backward()
    plain = [leaf.detach() for leaf in leaves]
    twice = torch.func.grad(lambda hidden: torch.func.grad(loss_of)(hidden, *plain[1:], head.targets).sum())
    with pytest.raises(RuntimeError, match="second derivative"):
        twice(plain[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    """Schema, fakes, autograd and tracing with dynamic shapes, by torch's own tests of operators."""
    head = random_head(T, V, D, dtype)
    hidden, weight, bias = leaves_of(head).values()
    temperatures = torch.linspace(0.5, 2.0, T)
    ops = torch.ops.tbrm_kernels
    common = (head.targets, temperatures)
    scaling = (dtype, 1.0, 9.0, 0.5)
    torch.library.opcheck(ops.linear_token_stats, (hidden, weight, bias, *common, *scaling, True, -100, "auto"))
    torch.library.opcheck(ops.linear_token_stats, (hidden, weight, None, *common, *scaling, False, -100, "auto"))
    vectors = torch.randn(4, T)
    rows = (vectors[0], vectors[1].abs(), None, vectors[2], None, None)
    inputs = (head.hidden, head.weight, None, *common, *rows, [True, False, False])
    torch.library.opcheck(ops.linear_token_stats_backward, (*inputs, *scaling, False, -100, "auto"))
    packed = (BOUNDS, *torch.randn(2, len(LENGTHS)), None, 0.5)
    for leaf, needs in ((bias, [True, True, True]), (None, [False, True, False])):
        arguments = (
            hidden.detach().requires_grad_(needs[0]),
            weight,
            leaf,
            *common,
            *packed,
            needs,
            *scaling,
            -100,
            None,
        )
        torch.library.opcheck(ops.fused_linear_tbrm_loss, (*arguments, "auto"))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks are device-side assertions there, and the incoming gradient is not read."""
    monkeypatch.setattr(checks, "_check_each", lambda *_: None)
    for module in (trajectory, trajectory_loss):
        monkeypatch.setattr(module, "check_bounds", lambda *_: None)
    monkeypatch.setattr(trajectory_loss, "_multiply_", registry._BACKENDS["triton"].multiply_)  # type: ignore[attr-defined]


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU would be waited for: a number that Python wants, or a shape that depends on data."""

    WAITS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "tolist"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def only_triton(backend: str) -> Iterator[None]:
    if backend != "triton":
        pytest.skip("the others run on the CPU, or may wait")
    yield


@pytest.mark.usefixtures("only_triton", "as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss_of", LOSSES)
def test_a_step_of_the_head_may_be_captured_in_a_graph(loss_of: LossOf, dtype: torch.dtype) -> None:
    head = random_head(T, V, D, dtype)
    leaves = list(leaves_of(head).values())
    losses = NoWaiting()
    with losses:
        (3 * loss_of(*leaves, head.targets)).backward()
    assert leaves[1].grad is not None
    with losses, pytest.raises(AssertionError, match="waits for the device"):  # it does notice
        head.targets.nonzero()


def critic(stats: TokenStats, cu_seqlens: Tensor, first: int, values: Tensor, weights: Tensor) -> Tensor:
    return (weights[:, 0] * stats.logprobs * (1 - values)).sum() + (values.square() + weights.sum(1)).sum()


@pytest.mark.parametrize("max_chunk_bytes", [None, 4 * V * 10], ids=["one chunk", "several"])
def test_tensors_of_tokens_are_cut_and_differentiated(max_chunk_bytes: int | None) -> None:
    head = random_head(T, V, D)

    def run(fused: bool) -> list[Tensor]:
        hidden, weight, _ = leaves_of(head).values()
        values = torch.linspace(-1, 1, T).requires_grad_()
        weights = torch.linspace(1, 3, 2 * T).view(T, 2).requires_grad_()
        inputs = (values.tanh(), weights)
        if fused:
            loss, _ = fused_linear_trajectory_loss(
                hidden,
                weight,
                head.targets,
                BOUNDS,
                critic,
                per_token=inputs,
                max_chunk_bytes=max_chunk_bytes,
            )
        else:
            loss = critic(linear_token_stats(hidden, weight, head.targets), BOUNDS, 0, *inputs)
        return [loss.detach(), *torch.autograd.grad(2 * loss, (hidden, weight, values, weights))]

    for ours, wanted in zip(run(fused=True), run(fused=False), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_a_critic_learns_on_a_frozen_head_and_a_frozen_critic_does_not() -> None:
    head = random_head(T, V, D)
    values = torch.linspace(-1, 1, T)
    weights = torch.ones(T, 2)
    for learns in (True, False):
        values.requires_grad_(learns)
        hidden = head.hidden.clone().requires_grad_(not learns)
        loss, _ = fused_linear_trajectory_loss(
            hidden, head.weight, head.targets, BOUNDS, critic, per_token=(values, weights)
        )
        loss.backward()
        assert (values.grad is not None) and (hidden.grad is not None) is not learns
    logprobs = linear_token_stats(head.hidden, head.weight, head.targets).logprobs
    torch.testing.assert_close(values.grad, 2 * values.detach() - logprobs)


@pytest.mark.parametrize("wrong", [torch.zeros(T + 1), torch.zeros(T, dtype=torch.int64)])
def test_tensors_of_other_tokens_are_refused(wrong: Tensor) -> None:
    head = random_head(T, V, D)
    with pytest.raises(ValueError, match=r"per_token\[0\] is .*it must be floating-point, \[T = 18, \.\.\.\]"):
        fused_linear_trajectory_loss(
            head.hidden, head.weight, head.targets.to(DEVICE), BOUNDS, per_token, per_token=[wrong]
        )


@pytest.mark.parametrize("lengths", [[T], LENGTHS], ids=["one trajectory", "several"])
@pytest.mark.parametrize("chunked", [False, True], ids=["one chunk", "several chunks"])
def test_a_scaled_float16_loss_gives_gradients_rounded_once(lengths: list[int], chunked: bool) -> None:
    """With a scale that keeps them from underflowing, as GradScaler has one; no worse than torch's own from float16 logits."""
    head = random_head(T, V, D, torch.float16, bias=False, ignored=0)
    scale, small = 2.0**16, 2.0**-14

    def gradients_of(loss_of: LossOf, hidden: Tensor, weight: Tensor) -> list[Tensor]:
        hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
        (loss_of(hidden, weight) * scale).backward()
        assert hidden.grad is not None and weight.grad is not None
        return [x.grad.double() / scale for x in (hidden, weight)]

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        budget = 4 * V * 10 if chunked else None
        loss_fn = lambda stats, *_: stats.logprobs.sum() * small  # noqa: E731
        return fused_linear_trajectory_loss(
            hidden, weight, head.targets, bounds(lengths), loss_fn, max_chunk_bytes=budget
        )[0]

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), -1)
        return logprobs.gather(1, head.targets[:, None]).sum() * small

    exact = gradients_of(plain, head.hidden.double(), head.weight.double())
    theirs, ours = (gradients_of(f, head.hidden, head.weight) for f in (plain, fused))
    for one, other, true in zip(ours, theirs, exact, strict=True):
        assert (one - true).norm() <= min((other - true).norm(), 2**-11 * true.norm())
