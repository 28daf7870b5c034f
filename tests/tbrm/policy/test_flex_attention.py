"""What FlexAttention is told of a packed batch: run as torch interprets it on a CPU, where it has no gradient of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

import tbrm.policy.flex_attention
from tbrm.policy.flex_attention import BLOCK, FLEX_ATTENTION, Forest
from tbrm.policy.model import PolicyModel
from tbrm.trajectories.packing import pack
from tests.tbrm.conftest import make_lm
from tests.tbrm.policy.dense_attention import dense_attention, packed, visible
from tests.tbrm.policy.test_model import trajectories, with_and_without_system_prompt

# Caps and windows, windows in some layers, grouped heads, none grouped, values narrower than keys.
VARIED = ["gemma2", "gemma3", "qwen2", "gpt-neox", "deepseek-v3"]
CPU = torch.device("cpu")
BATCHES = {
    "one token": pack([]),
    "one block": packed(0, [5], [[3, 4]]),
    "trees": packed(150, [40, 200, 7], [[90, 1, 300], [60, 60], [130]], longest=500),
    "prompts over blocks": packed(0, [400, 300], [[200, 200], [128, 256, 20]]),
}


@pytest.mark.parametrize("window", [None, 1, 50, 300])
@pytest.mark.parametrize("batch", BATCHES)
def test_each_token_sees_its_path(batch: str, window: int | None) -> None:
    segments = BATCHES[batch].inputs.segments
    expected = visible(segments, window)
    total = len(expected)
    mask = Forest(segments, CPU).within(window)
    assert mask.shape == (1, 1, total, total)
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, total, total, device="cpu")[0, 0], expected)


@pytest.mark.parametrize("window", [None, 1, 50, 300])
@pytest.mark.parametrize("batch", BATCHES)
def test_blocks_left_out_have_no_pair_and_unasked_ones_have_all(batch: str, window: int | None) -> None:
    segments = BATCHES[batch].inputs.segments
    mask = Forest(segments, CPU).within(window)
    expected = visible(segments, window)
    count = mask.kv_num_blocks.shape[-1]
    pairs = torch.zeros(count * BLOCK, count * BLOCK, dtype=torch.bool)
    pairs[: len(expected), : len(expected)] = expected
    pairs = pairs.view(count, BLOCK, count, BLOCK).transpose(1, 2)

    def listed(counts: Tensor | None, indices: Tensor | None) -> Tensor:
        assert counts is not None and indices is not None
        found = torch.zeros(count, count, dtype=torch.bool)
        for row, (number, columns) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
            found[row, columns[:number]] = True
        return found

    asked, whole = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (asked & whole).any()
    assert not pairs[~(asked | whole)].any()
    assert pairs[whole].all()
    # And the backward pass, which goes by blocks of keys, has the same ones.
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), asked.T)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), whole.T)
    if batch == "trees" and window is None:
        assert (
            whole.any() and (~(asked | whole)).sum() > (count * (count - 1)) // 2
        )  # more than what causality leaves out


def as_interpreted(*inputs: Tensor, **options: Any) -> Tensor:
    output: Tensor = flex_attention(*inputs, **options)
    return output


def by_its_own_rules(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, **options: Any) -> Tensor:
    """The same with gradients: the mask and the cap as the rules give them."""
    allowed = create_mask(block_mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device="cpu")
    cap, nowhere = options["score_mod"], torch.zeros((), dtype=torch.int32)
    bend = None if cap is None else lambda scores: cap(scores, nowhere, nowhere, nowhere, nowhere)
    assert options["enable_gqa"] == (query.shape[1] != key.shape[1])
    return dense_attention(query, key, value, allowed, options["scale"], bend).transpose(1, 2)


@with_and_without_system_prompt
@pytest.mark.parametrize("architecture", VARIED)
@torch.no_grad()
def test_stats_are_those_of_the_other_attention(
    architecture: str, system: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tbrm.policy.flex_attention, "_compiled", lambda: as_interpreted)
    batch = pack(trajectories(system))
    expected = PolicyModel(make_lm(architecture, tied=True))(batch)
    stats = PolicyModel(make_lm(architecture, tied=True), attention=FLEX_ATTENTION)(batch)
    torch.testing.assert_close(stats.logprobs, expected.logprobs, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(stats.lse, expected.lse, rtol=2e-5, atol=2e-5)


@with_and_without_system_prompt
@pytest.mark.parametrize("architecture", VARIED)
def test_gradients_are_those_of_the_other_attention(
    architecture: str, system: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tbrm.policy.flex_attention, "_compiled", lambda: by_its_own_rules)
    batch = pack(trajectories(system))
    found: list[list[Tensor]] = []
    for options in ({}, {"attention": FLEX_ATTENTION}):
        policy = PolicyModel(make_lm(architecture, tied=True), **options)  # type: ignore[arg-type]
        policy(batch).logprobs.sum().backward()
        found.append([p.grad for p in policy.parameters() if p.grad is not None])
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6
