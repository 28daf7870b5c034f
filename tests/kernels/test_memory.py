"""What linear_token_stats allocates in the torch backend, watched operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tbrm_kernels import linear_token_stats
from tbrm_kernels.backends import registry

pytestmark = pytest.mark.usefixtures("torch_backend")


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", {"torch": registry._BACKENDS["torch"]})


class Watch(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, and the number of elements cast."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.cast = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if func is torch.ops.aten._to_copy.default:
                    self.cast += tensor.numel()
        return result


def head(tokens: int, vocab: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    return hidden, torch.randn(vocab, width).to(dtype).requires_grad_(), torch.arange(tokens) % vocab


@pytest.fixture(params=[False, True], ids=["", "softcap and entropy"])
def options(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    yield {"softcap": 10.0, "entropy": True} if request.param else {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "vocab"), [(1100, 8192), (300, 32768)])
def test_the_logits_of_all_tokens_are_never_held(
    tokens: int, vocab: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The shipped tiles are of 2^21 elements at most; all that is held for longer is far smaller at these shapes."""
    hidden, weight, targets = head(tokens, vocab, 8, dtype)
    with Watch() as watch:
        stats = linear_token_stats(hidden, weight, targets, **options)
        sum(values.sum() for values in stats if values is not None).backward()
    assert weight.grad is not None
    assert watch.largest <= 2**21 < tokens * vocab // 4


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_no_gradient_is_allocated_for_what_is_frozen(frozen: str, set_tiles: Callable[[int, int], None]) -> None:
    set_tiles(8, 64)
    hidden, weight, targets = head(100, 50, 4, torch.float32)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    loss = linear_token_stats(hidden, weight, targets).logprobs.sum()
    with Watch() as watch:
        loss.backward()
    assert watch.largest == (hidden.numel() if frozen == "weight" else weight.numel())


def test_saved_for_backward_are_the_inputs_themselves_and_vectors() -> None:
    hidden, weight, targets = head(40, 70, 4, torch.float32)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        linear_token_stats(hidden, weight, targets, entropy=True)
    inputs = {hidden.data_ptr(), weight.data_ptr(), targets.data_ptr()}
    assert inputs <= {tensor.data_ptr() for tensor in saved}
    assert all(tensor.shape == (40,) for tensor in saved if tensor.data_ptr() not in inputs)


def test_each_weight_is_cast_once_per_pass(set_tiles: Callable[[int, int], None]) -> None:
    set_tiles(8, 64)  # 13 chunks of rows: casting once per chunk would show
    hidden, weight, targets = head(100, 50, 4, torch.bfloat16)
    once = hidden.numel() + weight.numel()
    with Watch() as watch:
        loss = linear_token_stats(hidden, weight, targets).logprobs.sum()
    assert watch.cast == once
    with Watch() as watch:
        loss.backward()
    assert watch.cast <= 2 * once  # the operands up once, hidden's gradient down once (the weight's by copying)
