from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tbrm.policy.architecture import check_architecture
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import trained_weights
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import ARCHITECTURES, VOCABULARY, make_lm

EVERY_MODEL = [(architecture, tied) for architecture in ARCHITECTURES for tied in (True, False)]
# 6 is more than the sliding windows of the models that have one.
with_and_without_system_prompt = pytest.mark.parametrize("system", [0, 6], ids=["", "system prompt"])


def trajectories(system: int = 0) -> list[Trajectory]:
    """Shared and lone prompts, a one-token prompt, a one-token response, a masked middle turn; and so many tokens that all
    prompts begin with."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    prefix = tokens(system)
    shared = prefix + tokens(7)
    return [
        Trajectory(shared, tokens(5), 1.0),
        Trajectory(shared, tokens(1), 0.0),
        Trajectory(shared, tokens(9), 0.5),
        Trajectory([*prefix, 4], tokens(6), 1.0),
        Trajectory(prefix + tokens(3), tokens(6), 0.0, action_mask=[True, False, False, True, True, False]),
    ]


def own_stats(lm: PreTrainedModel, trajectory: Trajectory, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The model's own logits, one trajectory at a time, through plain float64 torch."""
    tokens = torch.tensor([trajectory.prompt_ids + trajectory.response_ids])
    lm.set_attn_implementation("eager")
    logits = lm(input_ids=tokens, use_cache=False).logits[0].double() / temperature
    rows = [len(trajectory.prompt_ids) + i - 1 for i in trajectory.actions]
    logp = logits[rows].log_softmax(-1)
    targets = torch.tensor([trajectory.response_ids[i] for i in trajectory.actions])
    return logp.gather(1, targets[:, None])[:, 0], logits[rows].logsumexp(-1), -(logp.exp() * logp).sum(-1)


@with_and_without_system_prompt
@pytest.mark.parametrize(("architecture", "tied"), EVERY_MODEL)
@torch.no_grad()
def test_packed_stats_are_those_of_the_model_itself(architecture: str, tied: bool, system: int) -> None:
    lm = make_lm(architecture, tied=tied)
    items = trajectories(system)
    expected = [torch.cat(parts) for parts in zip(*(own_stats(lm, t, 0.7) for t in items), strict=True)]
    stats = PolicyModel(lm, temperature=0.7)(pack(items), entropy=True)
    for ours, theirs in zip(stats, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


@with_and_without_system_prompt
@pytest.mark.parametrize(("architecture", "tied"), EVERY_MODEL)
def test_packed_gradients_are_those_of_the_model_itself(architecture: str, tied: bool, system: int) -> None:
    lm = make_lm(architecture, tied=tied)
    items = trajectories(system)
    for t in items:
        logprobs, lse, _ = own_stats(lm, t, 1.0)
        (logprobs.sum() + lse[0]).backward()
    expected = {name: p.grad.clone() for name, p in lm.named_parameters() if p.requires_grad}
    lm.zero_grad()
    batch = pack(items)
    stats = PolicyModel(lm)(batch)
    (stats.logprobs.sum() + stats.lse[batch.cu_seqlens[:-1].long()].sum()).backward()
    for name, p in lm.named_parameters():
        if not p.requires_grad:  # a bias that a router learns in its own way
            assert p.grad is None
            continue
        assert (p.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


@with_and_without_system_prompt
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_packed_batch_gives_the_stats_of_each_trajectory_alone(architecture: str, system: int) -> None:
    policy = PolicyModel(make_lm(architecture, tied=True))
    items = trajectories(system)
    packed = policy(pack(items))
    alone = [policy(pack([t])) for t in items]
    torch.testing.assert_close(packed.logprobs, torch.cat([s.logprobs for s in alone]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.lse, torch.cat([s.lse for s in alone]), rtol=1e-5, atol=1e-5)


def test_prompt_positions_never_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    import tbrm.policy.model

    rows = []
    real = tbrm.policy.model.linear_token_stats
    monkeypatch.setattr(tbrm.policy.model, "linear_token_stats", lambda **k: rows.append(len(k["hidden"])) or real(**k))
    items = trajectories()
    PolicyModel(make_lm("llama", tied=True))(pack(items))
    assert rows == [sum(len(t.actions) for t in items)]


# DeepSeek-V3 rotates only a part of each query, in float32, and keys become bfloat16 again.
@pytest.mark.parametrize("architecture", ["qwen3", "deepseek-v3"])
def test_bfloat16_stays_near_float32(architecture: str) -> None:
    policy = PolicyModel(make_lm(architecture, tied=True))
    batch = pack(trajectories())
    exact = policy(batch)
    policy.precision = torch.bfloat16
    check_architecture(policy)
    rounded = policy(batch)
    assert rounded.logprobs.dtype is torch.float32
    gap = (rounded.logprobs - exact.logprobs).abs()
    assert 0 < gap.median() < 0.02 * exact.logprobs.abs().max()
    rounded.logprobs.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained_weights(policy).values())


@pytest.mark.parametrize(("architecture", "tied"), EVERY_MODEL)
def test_supported_models_pass_the_check(architecture: str, tied: bool) -> None:
    check_architecture(PolicyModel(make_lm(architecture, tied=tied)))


def test_a_model_that_does_something_unknown_to_its_logits_is_refused() -> None:
    lm = make_lm("llama", tied=True)
    policy = PolicyModel(lm)
    policy.logit_scale = 2.0  # as if the model divided its logits under a name we do not know
    with pytest.raises(ValueError, match="LlamaForCausalLM is not supported"):
        check_architecture(policy)
