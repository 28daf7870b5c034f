from __future__ import annotations

import pytest
import torch

from tbrm.policy.model import PolicyModel
from tbrm.policy.reference import ReferenceModel
from tbrm.trajectories.batch import ScoredBatch
from tbrm.trajectories.deal import deal
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import ARCHITECTURES, make_lm
from tests.tbrm.policy.test_model import trajectories


def scored(reference: ReferenceModel, items: list[Trajectory]) -> ScoredBatch:
    if not all(map(reference.has_scored, items)):
        reference.score(pack(items), items)
    unsaid = [torch.full((len(item.actions),), torch.nan) for item in items]
    return reference.scored(items, unsaid, columns={})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_log_ratio_is_exactly_zero_at_step_0(architecture: str, precision: torch.dtype) -> None:
    policy = PolicyModel(make_lm(architecture, tied=True), precision=precision)
    reference = ReferenceModel(policy)
    items = trajectories()
    for members in deal(items, 20, 1)[0]:
        part = [items[i] for i in members]
        batch = scored(reference, part)
        stats = policy(batch)  # with gradient, unlike the reference's pass
        assert stats.logprobs.requires_grad
        assert torch.equal(stats.logprobs, batch.ref_logprobs)
        assert torch.equal(stats.lse[batch.cu_seqlens[:-1].long()], batch.ref_values)


def test_each_trajectory_is_scored_once_per_version() -> None:
    policy = PolicyModel(make_lm("llama", tied=True))
    reference = ReferenceModel(policy)
    forwards = []
    reference.model.register_forward_hook(lambda *_: forwards.append(1))
    items = trajectories()
    first = scored(reference, items)
    again = scored(reference, items[::-1])
    assert len(forwards) == 1
    assert torch.equal(again.ref_values, first.ref_values.flip(0))

    with torch.no_grad():
        policy.lm.get_input_embeddings().weight.mul_(1.1)
    assert torch.equal(scored(reference, items).ref_logprobs, first.ref_logprobs)  # a copy, not a view
    reference.reset(policy)
    renewed = scored(reference, items)
    assert len(forwards) == 2
    assert reference.version == 1
    assert not torch.equal(renewed.ref_logprobs, first.ref_logprobs)
    assert torch.equal(renewed.ref_logprobs, policy(renewed).logprobs)


def test_a_score_holds_the_state_of_the_prompt_where_it_is_wanted() -> None:
    lm, items = make_lm("llama", tied=True), trajectories()
    reference = ReferenceModel(PolicyModel(make_lm("llama", tied=True)))
    scored(reference, items)
    assert all(item.reference.state is None for item in items)
    reference.keeps_states = True
    assert not any(map(reference.has_scored, items))
    scored(reference, items)
    acting = [item for item in items if item.acts]
    for item in acting:
        seen = item.prompt_ids + item.response_ids[: item.actions[0]]  # what comes before its first action
        own = lm.base_model(torch.tensor([seen])).last_hidden_state[0, -1]
        assert torch.allclose(item.reference.state, own, atol=1e-5)
    assert all(map(reference.has_scored, acting)) and len(acting) > 2


def test_the_reference_takes_no_gradient() -> None:
    policy = PolicyModel(make_lm("llama", tied=True))
    reference = ReferenceModel(policy)
    items = [Trajectory([3, 4], [5, 6], 1.0)]
    batch = scored(reference, items)
    assert not batch.ref_logprobs.requires_grad
    policy(batch).logprobs.sum().backward()
    assert all(p.grad is None for p in reference.model.parameters())
