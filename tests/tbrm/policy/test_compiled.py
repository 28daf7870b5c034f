"""Norms and MLPs through torch.compile, and so through the C++ that it writes here."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tbrm.policy.model import PolicyModel
from tbrm.policy.reference import ReferenceModel
from tbrm.policy.sharded import frozen_copy
from tbrm.reporting.metrics import read_jsonl
from tbrm.rollout import EmbeddedEngine, Sampling, make_requests
from tbrm.training.trainer import Trainer
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import chat_of, make_lm, tiny_config
from tests.tbrm.policy.test_model import trajectories
from tests.tbrm.policy.test_reference import scored


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [("llama", torch.bfloat16), ("qwen3", torch.float32), ("gemma3", torch.float32)],
)
def test_stats_and_gradients_are_those_of_the_model_itself(architecture: str, precision: torch.dtype) -> None:
    lm = make_lm(architecture, tied=True)
    plain = PolicyModel(copy.deepcopy(lm), precision=precision)
    policy = PolicyModel(lm, precision=precision, compiled=True)
    reference = ReferenceModel(policy)
    items = trajectories()
    tolerance = 1e-5 if precision is torch.float32 else 0.05
    made = []
    for part in (items, items[:1], items[1:4]):
        batch = scored(reference, [Trajectory(x.prompt_ids, x.response_ids, x.reward) for x in part])
        found = []
        for model in (plain, policy):
            model.zero_grad()
            stats = model(batch)
            (stats.logprobs.sum() + stats.lse.sum()).backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            found.append([stats.logprobs.detach(), stats.lse.detach(), gradient])
        for ours, expected in zip(found[1], found[0], strict=True):
            assert (ours - expected).norm() <= tolerance * expected.norm()
        # The reference's pass has graphs of its own, without gradient, and the same numbers.
        assert torch.equal(found[1][0], batch.ref_logprobs)
        made.append(graphs())
    assert made[0] > 0, "nothing was compiled"
    assert made == made[:1] * 3, "graphs were made anew for another batch"


def test_a_copy_has_weights_of_its_own() -> None:
    policy = PolicyModel(make_lm("llama", tied=True), compiled=True)
    frozen = frozen_copy(policy)
    batch = pack(trajectories())
    before = frozen(batch).logprobs
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert torch.equal(frozen(batch).logprobs, before)


def test_generation_compiles_nothing() -> None:
    policy = PolicyModel(make_lm("llama", tied=True), compiled=True)
    plain = PolicyModel(make_lm("llama", tied=True))
    greedy = Sampling(max_new_tokens=8, temperature=0)
    answers = [
        EmbeddedEngine(model, chat_of(model.lm), batch_size=2).generate(make_requests([[3, 4], [5, 6, 7]], 1), greedy)
        for model in (policy, plain)
    ]
    assert answers[0] == answers[1]
    assert graphs() == 0


def test_a_run_learns_as_without(tmp_path: Path) -> None:
    losses = {}
    for compiled in (False, True):
        run = tmp_path / str(compiled)
        Trainer(tiny_config(run, model__compile=compiled, parallel={"activation_checkpointing": True})).train()
        losses[compiled] = [row["loss"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row]
        assert (graphs() > 0) == compiled
    assert len(losses[True]) == 4
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"model.compile: true, but there is no no-such-compiler: install one"):
        PolicyModel(make_lm("llama", tied=True), compiled=True)
