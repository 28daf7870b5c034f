"""What is decayed, and at which rates."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, GptOssConfig

from tbrm.config.model import LoraConfig, ModelConfig
from tbrm.config.training import OptimConfig, ParallelConfig
from tbrm.policy.lora import Adapters
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import trained_weights
from tbrm.policy.sharded import shard
from tbrm.policy.sharding import Sharding
from tbrm.training.optimizer import Part, make_optimizer
from tbrm.training.schedule import learning_rate_at
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import ARCHITECTURES, tiny_config


def test_weight_decay_leaves_norms_and_biases_alone(tmp_path: Path) -> None:
    after = {}
    for decay in (0.0, 0.5):
        trainer = Trainer(tiny_config(tmp_path, optim__weight_decay=decay, evaluation={"prompts": 0}))
        trainer.train_step()
        after[decay] = {name: weight.detach() for name, weight in trained_weights(trainer.policy).items()}
    changed = {name for name, weight in after[0.5].items() if not torch.equal(weight, after[0.0][name])}
    assert changed == {name for name, weight in after[0.0].items() if weight.dim() > 1}
    assert 0 < len(changed) < len(after[0.0])


def undecayed(policy: PolicyModel) -> set[str]:
    names = {weight: name for name, weight in trained_weights(policy).items()}
    groups = make_optimizer(Part(policy, trained_weights(policy)), OptimConfig(weight_decay=0.1)).param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[weight] for group in groups if group["weight_decay"] == 0 for weight in group["params"]}


def test_gains_and_biases_of_two_dimensions_are_not_decayed_either() -> None:
    """The gain of each head, [heads, D], and the bias of each expert, [experts, D]; whole, in slices, and beside adapters."""
    gains = copy.deepcopy(ARCHITECTURES["cohere"])
    gains.use_qk_norm = True
    width = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 97, "num_hidden_layers": 2}
    biases = GptOssConfig(**width, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        for config, wide in ((gains, ("q_norm.weight", "k_norm.weight")), (biases, ("_proj_bias",))):
            policy = PolicyModel(AutoModelForCausalLM.from_config(config))
            weights = trained_weights(policy)
            expected = {name for name, weight in weights.items() if weight.dim() == 1 or name.endswith(wide)}
            assert undecayed(policy) == expected
            assert any(weights[name].dim() == 2 for name in expected)
            shard(policy, Sharding(mesh, ParallelConfig(), torch.float32))
            assert undecayed(policy) == expected
    finally:
        dist.destroy_process_group()
    lm = AutoModelForCausalLM.from_config(gains)
    adapters = Adapters(lm, LoraConfig(rank=2, targets=["q_proj"]), ModelConfig(name="base"), seed=0)
    policy = PolicyModel(lm)
    policy.adapters = adapters
    assert trained_weights(policy) and not undecayed(policy)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_learning_rate(schedule: str, rates: list[float]) -> None:
    optim = OptimConfig(learning_rate=1.0, warmup_steps=2, schedule=schedule)
    assert [learning_rate_at(step, optim, 6) for step in range(1, 7)] == pytest.approx(rates, abs=1e-4)


def test_the_norm_of_no_gradients_lies_on_the_models_device(tmp_path: Path) -> None:
    """Of a step whose trajectories were all dropped; it joins sums that are there."""
    trainer = Trainer(tiny_config(tmp_path, evaluation={"prompts": 0}))
    trainer.device = torch.device("meta")
    seen: list[str] = []
    trainer._clip_gradients(SimpleNamespace(means=lambda norm, _: seen.append(norm.device.type) or {}))
    assert seen == ["meta"]
