"""Problems for the head, and what plain torch makes of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tbrm_kernels import linear_token_stats
from tbrm_kernels.backends import cpu, registry
from tbrm_kernels.reference import token_stats_reference

OUTPUTS = ("logprobs", "lse", "entropy")

DEVICE = torch.device(os.environ.get("TBRM_TEST_DEVICE", "cpu"))
"""Where the tests' tensors are: `make test-gpu` puts them on the GPU."""


EXAMPLES = 100 if DEVICE.type == "cpu" else 20
"""Of a property: a GPU compiles the kernels anew for many a shape."""


def vocabulary(entries: int, backend: str) -> int:
    """As many, or where each tile of a Triton kernel is interpreted, which takes a second, an odd number of several tiles."""
    return entries // 16 | 1 if backend == "triton" and DEVICE.type == "cpu" else entries


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


@dataclass
class Head:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    def double(self) -> Head:
        bias = None if self.bias is None else self.bias.double()
        return Head(self.hidden.double(), self.weight.double(), bias, self.targets)


def random_head(
    tokens: int,
    vocab: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    ignored: float = 0.2,
    seed: int = 0,
) -> Head:
    """Logits of standard deviation 3; the first and last token ids are among the targets."""
    generator = seeded(seed)
    randn = partial(torch.randn, generator=generator)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[1:2], targets[2:3] = 0, vocab - 1
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    return Head(
        randn(tokens, width).to(dtype),
        (randn(vocab, width) * 3 / width**0.5).to(dtype),
        randn(vocab).to(dtype) if bias else None,
        targets,
    )


def values_and_gradients(
    function: Callable[..., Any], head: Head, through: tuple[str, ...] = OUTPUTS, **options: Any
) -> dict[str, Tensor]:
    """The outputs, and the gradients of a sum of the outputs named in `through` with non-uniform weights."""
    leaves = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    stats = function(leaves["hidden"], leaves["weight"], head.targets, bias=leaves.get("bias"), **options)
    results = {name: value for name, value in zip(OUTPUTS, stats, strict=True) if value is not None}

    generator = seeded(1)
    weights = {name: torch.randn(head.targets.shape, generator=generator) for name in OUTPUTS}
    loss = sum((weights[name] * results[name]).sum() for name in through if name in results)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return results | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def plain_bfloat16(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition with its products, forward and backward, between bfloat16 operands, as a linear layer has them."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return token_stats_reference(logits, torch.eye(len(weight)), targets, **options)


def multiplies_bfloat16(head: Head) -> bool:
    """Whether the backend in use rounds dlogits to bfloat16, and is to be compared with torch that does so too."""
    in_use = registry._BACKENDS
    able = "triton" in in_use or DEVICE.type == "cuda" or ("cpu" in in_use and cpu.multiplies_bfloat16())
    return able and head.hidden.dtype == torch.bfloat16


def luck(head: Head) -> int:
    """How many times as large our errors may be as plain torch's, whose roundings may cancel where ours do not."""
    return 4 if multiplies_bfloat16(head) else 2


def rounding(head: Head) -> float:
    """The relative error of a derivative when it becomes an operand."""
    if not multiplies_bfloat16(head):
        return 0.0
    return 2**-9 if "triton" not in registry._BACKENDS or DEVICE.type == "cuda" else 2**-7  # the interpreter truncates


def assert_as_good_as_plain_torch(head: Head, slack: float = 8, **options: Any) -> None:
    """Our error against float64 is at most `luck` times plain torch's, plus a few roundings of the largest value.

    Float64 inputs have no truth above them: there the two sides differ by their own roundings only.
    """
    truth = values_and_gradients(token_stats_reference, head.double(), **options)
    plain = values_and_gradients(token_stats_reference, head, **options)
    if multiplies_bfloat16(head):  # the gradients only: the statistics must be as good as with float32 products
        rounded = values_and_gradients(plain_bfloat16, head, **options)
        plain |= {name: value for name, value in rounded.items() if name not in OUTPUTS}
    ours = values_and_gradients(linear_token_stats, head, **options)
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        assert ours[name].shape == true.shape
        assert ours[name].dtype == plain[name].dtype, name
        if true.numel() == 0:
            continue
        roundings = 1e-12 if head.hidden.dtype == torch.float64 else slack * torch.finfo(torch.float32).eps
        scale = true.abs().max()
        if name in OUTPUTS:  # logarithms: their errors are absolute, in nats, of terms as large as the log-probs
            scale = truth["logprobs"].abs().max().clamp(min=max(1.0, float(scale)))
        else:  # a derivative may be the small difference of terms of about this size
            roundings += rounding(head)
            other = {"d_hidden": head.weight, "d_weight": head.hidden}.get(name, torch.ones(1))
            factor = float(
                torch.max(options.get("logit_scale", 1.0) / torch.as_tensor(options.get("temperature", 1.0)))
            )
            scale = scale.clamp(min=factor * max(other.abs().flatten().tolist(), default=0.0))
        # Where plain torch has no number, as on a GPU for a bias of -3e38, the roundings alone.
        allowed = luck(head) * (plain[name] - true).abs().max().nan_to_num(0) + roundings * scale
        error = (ours[name] - true).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
