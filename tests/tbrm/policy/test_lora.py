"""LoRA in one process; tests/tbrm/test_parallel.py has it in several."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tbrm.config.model import LoraConfig, ModelConfig
from tbrm.config.section import ConfigError
from tbrm.policy.generation import generation_mode
from tbrm.policy.lora import Adapters
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import trained_weights, weights_of
from tbrm.policy.reference import ReferenceModel
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.rollout import Response
from tbrm.rollout.vllm.check import StaleWeightsError, SyncCheck
from tbrm.rollout.vllm.handover import Handover, options_for_adapters
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import DENSE, chat_of, make_lm, tiny_config
from tests.tbrm.policy.test_model import trajectories

TARGETS = ["q_proj", "up_proj", "lm_head"]


def with_adapters(architecture: str, *targets: str, tied: bool = False) -> PolicyModel:
    lm = make_lm(architecture, tied=tied)
    adapters = Adapters(lm, LoraConfig(rank=4, targets=list(targets)), ModelConfig(name="base"), seed=0)
    policy = PolicyModel(lm)
    policy.adapters = adapters
    adapters.reset()
    return policy


def test_a_check_beside_training_sees_the_adapters_though_the_reference_is_scored_without_them() -> None:
    policy = with_adapters("llama", *TARGETS)
    with torch.no_grad():
        for name, weight in trained_weights(policy).items():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    check = SyncCheck(policy, tiny_tokenizer(), limit=None)
    check._prompt = list(range(5, 85))  # of this model's vocabulary
    prompt, answer = check.prompt(64), list(range(5, 13))
    truth = policy(pack([Trajectory(prompt, answer, 0.0)])).logprobs.tolist()
    stop, gaps = threading.Event(), []

    def check_again_and_again() -> None:
        while not stop.is_set():
            gaps.append(gap_of(lambda: check([Response(answer, False, 0, truth)], torch.float32, 64)))

    thread = threading.Thread(target=check_again_and_again)
    thread.start()
    reference, work = (
        ReferenceModel(policy),
        [Trajectory(list(range(5, 60)), list(range(5, 45)), 0.0) for _ in range(8)],
    )
    for _ in range(20):
        reference.score(pack(work), work)
    stop.set()
    thread.join()
    assert len(gaps) > 5
    assert max(gaps) <= 1e-3


def gap_of(check: Callable[[], dict[str, float]]) -> float:
    try:
        return check()["sync/logprob_gap_max"]
    except StaleWeightsError:
        return math.inf


@pytest.mark.parametrize("architecture", DENSE)
def test_gradients_are_those_of_the_adapted_model_itself(architecture: str) -> None:
    policy = with_adapters(architecture, *TARGETS)
    lm, items = policy.lm, trajectories()
    weights = {name: weight for name, weight in trained_weights(policy).items()}
    assert len(weights) == 2 * (3 + 3 + 1)
    for weight in weights.values():
        torch.nn.init.normal_(weight, std=0.2)
    for t in items:
        with generation_mode(policy):
            logits = lm(input_ids=torch.tensor([t.prompt_ids + t.response_ids]), use_cache=False).logits[0]
        rows = [len(t.prompt_ids) + i - 1 for i in t.actions]
        targets = torch.tensor([t.response_ids[i] for i in t.actions])
        logits[rows].log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    expected = {name: weight.grad.clone() for name, weight in weights.items()}
    lm.zero_grad()
    policy(pack(items)).logprobs.sum().backward()
    for name, weight in weights.items():
        assert expected[name].any()
        assert (weight.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name
    assert all(weight.grad is None for weight in weights_of(policy).values())


@torch.no_grad()
def test_vllm_is_handed_the_sums() -> None:
    """Under the names of the model without adapters, which then says what the adapted one does."""
    policy, plain = with_adapters("qwen3", *TARGETS), make_lm("qwen3", tied=False)
    for weight in trained_weights(policy).values():
        torch.nn.init.normal_(weight, std=0.2)
    handover = Handover(policy, torch.float32, chat_of(policy.lm).ends)
    assert handover.folder is not None
    handover.write()
    weights = load_file(handover.folder / "model.safetensors")
    shutil.rmtree(handover.folder)
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    batch = pack(trajectories())
    torch.testing.assert_close(PolicyModel(plain)(batch).logprobs, policy(batch).logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "tied", "message"),
    [
        (["q_proj", "lm_head"], True, "'lm_head' is tied to the embedding in LlamaForCausalLM"),
        (["q_proj", "w_proj"], False, "'w_proj' is no linear layer of LlamaForCausalLM; name some of down_proj, "),
        (["embed_tokens"], False, "'embed_tokens' is no linear layer"),
    ],
)
def test_what_would_not_train_is_refused(targets: list[str], tied: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_adapters("llama", *targets, tied=tied)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "lora.rank is set but model.name is 'tiny'"),
        (
            {
                "model__name": "folder",
                "objective": {"name": "reval", "beta": 0.1, "reset_reference_every": 2},
            },
            "objective.reset_reference_every is 2 but lora.rank is set",
        ),
        (
            {"model__name": "folder", "parallel": {"offload_reference": True}},
            "parallel.offload_reference is true but lora.rank is set",
        ),
    ],
)
def test_keys_that_do_not_go_with_adapters_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, lora__rank=4, **settings)


@pytest.mark.parametrize("rank", [0, 513])
def test_adapters_that_vllm_cannot_take_are_refused(tmp_path: Path, rank: int) -> None:
    settings = {"model__name": "folder", "lora__rank": rank, "rollout__vllm": {"transfer": "adapters"}}
    with pytest.raises(ValueError, match=f"rollout.vllm.transfer is adapters but lora.rank is {rank}"):
        tiny_config(tmp_path, **settings)
    assert options_for_adapters(9)["max_lora_rank"] == 16
    assert options_for_adapters(512)["max_lora_rank"] == 512
