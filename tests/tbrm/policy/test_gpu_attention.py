"""Packed attention on a real GPU: `TBRM_TEST_DEVICE=cuda pytest --noconftest tests/tbrm/policy/test_gpu_attention.py`.

The truth is one mask over all pairs in float64. In bfloat16 no result may be further from it than 1.5 times torch's SDPA under
that mask, or than the same mask in plain bfloat16 products where scores are soft-capped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, MistralConfig, Qwen2Config

from tbrm.policy.flash_attention import FLASH_ATTENTION, VARLEN_ATTENTION, Paths, flash_attention, varlen_attention
from tbrm.policy.flex_attention import FLEX_ATTENTION, Forest, packed_flex_attention
from tbrm.policy.packed_attention import PACKED_ATTENTION, Tree, packed_attention
from tbrm.trajectories.packing import PackedBatch, pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.policy.dense_attention import dense_attention, outputs_and_gradients, packed, visible

DEVICE = torch.device(os.environ.get("TBRM_TEST_DEVICE", "cpu"))
pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="these kernels run on NVIDIA GPUs: TBRM_TEST_DEVICE=cuda")
try:
    import flash_attn  # noqa: F401
except ImportError:
    HAS_FLASH = False
else:
    HAS_FLASH = True
flash = pytest.param("flash", marks=pytest.mark.skipif(not HAS_FLASH, reason="flash-attn is not installed"))
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "flash": (flash_attention, Paths.of),
    "varlen": (varlen_attention, Paths.of),
    "flex": (packed_flex_attention, Forest),
    "sdpa": (packed_attention, Tree.of),
}
PARTS = ("output", "queries' gradient", "keys' gradient", "values' gradient")


@pytest.fixture(autouse=True)
def no_kernels_of_other_tests() -> Iterator[None]:
    """FlexAttention is compiled for so many shapes at most."""
    torch._dynamo.reset()
    yield
    torch.cuda.empty_cache()


@dataclass(frozen=True)
class Heads:
    width: int
    queries: int
    keys: int
    window: int | None = None
    softcap: float | None = None
    scaling: float | None = None
    value_width: int | None = None

    def inputs(self, tokens: int) -> list[Tensor]:
        """Queries, keys and values [1, heads, T, .], as projections leave them."""
        shapes = [(self.queries, self.width), (self.keys, self.width), (self.keys, self.value_width or self.width)]
        generator = torch.Generator(DEVICE).manual_seed(0)
        made = [torch.randn(1, tokens, *shape, generator=generator, device=DEVICE) for shape in shapes]
        # Twice as long as usual, so that attention is to some keys more than to others.
        return [(x * scale).bfloat16().transpose(1, 2) for x, scale in zip(made, (2.0, 1.0, 1.0), strict=True)]


QWEN = Heads(64, 14, 2)
MISTRAL = Heads(128, 8, 8, window=100)
GEMMA3 = Heads(256, 4, 1, window=300, scaling=0.05)
DEEPSEEK = Heads(192, 4, 4, value_width=128, scaling=0.1)
NARROW = Heads(20, 3, 1, window=3)
GEMMA2 = Heads(256, 8, 4, window=100, softcap=3.0, scaling=0.0625)
CAPPED = Heads(64, 4, 2, softcap=1.5)


@cache
def trees() -> PackedBatch:
    """A system prompt; prompts with several responses, of one token and of hundreds; one alone; and one past what shares."""
    return packed(150, [40, 200, 7], [[90, 1, 300], [60] * 12, [130]], longest=1300)


def soft_capped(softcap: float) -> Callable[[Tensor], Tensor]:
    return lambda scores: softcap * torch.tanh(scores / softcap)


def errors_of(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, truth, strict=True)]


@cache
def truth_and_rounding(heads: Heads) -> tuple[list[Tensor], list[float]]:
    """Output and gradients in float64, and how far from them torch is in bfloat16."""
    batch = trees()
    inputs, allowed = heads.inputs(len(batch.inputs.input_ids)), visible(batch.inputs.segments, heads.window).to(DEVICE)
    bend = None if heads.softcap is None else soft_capped(heads.softcap)
    dense = partial(dense_attention, allowed=allowed, scaling=heads.scaling, bend=bend)
    truth = outputs_and_gradients(dense, *(x.double() for x in inputs))

    def with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads.queries // heads.keys, dim=1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, allowed, scale=heads.scaling).transpose(1, 2)

    return truth, errors_of(outputs_and_gradients(dense if bend else with_mask, *inputs), truth)


def attend(kind: str, heads: Heads, batch: PackedBatch, *inputs: Tensor) -> Tensor:
    function, form = FUNCTIONS[kind]
    options = {"scaling": heads.scaling, "sliding_window": heads.window, "softcap": heads.softcap}
    output: Tensor = function(None, *inputs, None, segments=form(batch.inputs.segments, DEVICE), **options)[0]
    return output


@pytest.mark.parametrize("heads", [QWEN, MISTRAL, GEMMA3, DEEPSEEK, NARROW], ids=str)
@pytest.mark.parametrize("kind", ["varlen", flash, "sdpa"])
def test_no_further_from_the_truth_than_sdpa_under_a_mask(kind: str, heads: Heads) -> None:
    check(kind, heads)


@pytest.mark.parametrize("heads", [CAPPED, GEMMA2], ids=str)
@pytest.mark.parametrize("kind", ["flex", flash])
def test_soft_capped_scores_are_no_further_from_the_truth(kind: str, heads: Heads) -> None:
    check(kind, heads)


def check(kind: str, heads: Heads) -> None:
    batch, (truth, allowed_errors) = trees(), truth_and_rounding(heads)
    found = outputs_and_gradients(partial(attend, kind, heads, batch), *heads.inputs(len(batch.inputs.input_ids)))
    errors = errors_of(found, truth)
    print(
        kind, heads, {part: (f"{e:.2e}", f"{a:.2e}") for part, e, a in zip(PARTS, errors, allowed_errors, strict=True)}
    )
    for part, error, allowed in zip(PARTS, errors, allowed_errors, strict=True):
        assert error <= 1.5 * allowed, part


@pytest.mark.parametrize("kind", ["varlen", flash])
@pytest.mark.parametrize("batch", [packed(0, [5], [[1]]), packed(0, [4, 9], [[1, 1, 1], [2]])], ids=["alone", "few"])
def test_small_batches(kind: str, batch: PackedBatch) -> None:
    inputs = QWEN.inputs(len(batch.inputs.input_ids))
    dense = partial(dense_attention, allowed=visible(batch.inputs.segments, None).to(DEVICE))
    truth = outputs_and_gradients(dense, *(x.double() for x in inputs))
    found = outputs_and_gradients(partial(attend, kind, QWEN, batch), *inputs)
    assert max(errors_of(found, truth)) < 0.02


@pytest.mark.parametrize("kind", ["varlen", flash])
def test_a_prompts_gradient_is_summed_over_its_responses_in_float32(kind: str) -> None:
    """Added up in bfloat16, parts of 1 would come to 256 and stay there."""
    batch = pack([Trajectory([3], [4 + i, 4], 0.0) for i in range(300)])
    query, value = (torch.zeros(1, 1, 301, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    value.requires_grad_()
    output = attend(kind, Heads(64, 1, 1), batch, query, query, value)
    (grad,) = torch.autograd.grad(output, value, torch.full_like(output, 2))
    assert grad[0, 0, 0].tolist() == [302.0] * 64  # its own 2, and half of each response's


@pytest.mark.parametrize(("kind", "heads"), [("varlen", QWEN), ("varlen", MISTRAL), ("flex", CAPPED)], ids=str)
def test_told_to_be_deterministic_two_passes_give_the_same_bits(kind: str, heads: Heads) -> None:
    batch = trees()
    inputs = heads.inputs(len(batch.inputs.input_ids))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (outputs_and_gradients(partial(attend, kind, heads, batch), *inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for part, ours, again in zip(PARTS, first, second, strict=True):
        assert torch.equal(ours, again), part


_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
MODELS = {
    "qwen2": (VARLEN_ATTENTION, Qwen2Config(**_SHAPE)),
    "mistral": (VARLEN_ATTENTION, MistralConfig(**_SHAPE, head_dim=64, sliding_window=50)),
    "gemma3": (VARLEN_ATTENTION, Gemma3TextConfig(**_SHAPE, head_dim=64, sliding_window=50, sliding_window_pattern=2)),
    "gemma2": (FLEX_ATTENTION, Gemma2Config(**_SHAPE, head_dim=64, sliding_window=50, attn_logit_softcapping=2.0)),
}


def logprobs_and_gradients(attention: str, model: str, precision: torch.dtype) -> list[Tensor]:
    """Of the actions of a packed batch, through the model's blocks and a plain float32 head; and of each of its weights."""
    from tbrm.policy.model import PolicyModel

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(MODELS[model][1], attn_implementation="eager")
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    policy = PolicyModel(lm.to(DEVICE), precision=precision, attention=attention)
    batch = trees().to(DEVICE)
    with policy.autocast():
        hidden = batch.inputs.run(policy.lm)
    logits = hidden.float() @ lm.get_output_embeddings().weight.T
    logprobs = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    logprobs.sum().backward()
    return [logprobs.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)]


@pytest.mark.parametrize("model", MODELS)
def test_a_models_packed_logprobs_and_gradients(model: str) -> None:
    """Segment by segment in float32 is the truth here; in bfloat16 it says how far rounding takes a model."""
    kind = MODELS[model][0]
    truth = [x.double() for x in logprobs_and_gradients(PACKED_ATTENTION, model, torch.float32)]
    ways = [kind, *([FLASH_ATTENTION] if HAS_FLASH else [])]
    rounded = errors_of(logprobs_and_gradients(PACKED_ATTENTION, model, torch.bfloat16), truth)
    for way in ways:
        errors = errors_of(logprobs_and_gradients(way, model, torch.bfloat16), truth)
        print(
            model,
            way,
            f"log-probs {errors[0]:.2e} ({rounded[0]:.2e})",
            f"gradients {max(errors[1:]):.2e} ({max(rounded[1:]):.2e})",
        )
        for error, allowed in zip(errors, rounded, strict=True):
            assert error <= 1.5 * allowed + 1e-4
