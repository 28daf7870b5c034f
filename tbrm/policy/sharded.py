"""A policy cut over processes, and a frozen twin of one that is or is not."""

from __future__ import annotations

import copy

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from tbrm.policy.model import PolicyModel
from tbrm.policy.sharding import Sharding
from tbrm.policy.vocab_parallel import DividedVocabulary
from tbrm.policy.weights import materialise
from tbrm.trajectories.layout import Rows


def shard(policy: PolicyModel, sharding: Sharding) -> None:
    """Cuts the policy's weights over the processes; those on the meta device are given memory, and are still to be read."""
    if not policy.blocks:
        raise ValueError(
            f"model.name: {type(policy.lm).__name__} does not say what its blocks are (_no_split_modules), so it cannot be "
            "sharded; run it in one process, without torchrun"
        )
    on_meta = policy.lm.device.type == "meta"
    trained = any(parameter.requires_grad for parameter in policy.parameters())
    if sharding.config.vocab_parallel:
        policy.vocabulary = DividedVocabulary(policy.lm, sharding.weights_mesh)
    divided = set(policy.vocabulary.parameters) if policy.vocabulary else set()
    sharding.apply(policy, policy.blocks, trained=trained, divided=divided)
    register_fsdp_forward_method(policy, "own_logits")
    register_fsdp_forward_method(policy, "states")
    if on_meta:
        materialise(policy.lm, sharding.weights_device, sharding.device)
    if sharding.precision is not torch.float32:
        sum_in_float32(policy)
    policy.sharding = sharding


def sum_in_float32(policy: PolicyModel) -> None:
    """Keeps the sums over blocks float32 where weights are of lower precision, as they are where autocast makes it."""
    policy.lm.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.float())


def frozen_copy(policy: PolicyModel) -> PolicyModel:
    """The same model as it is now, sharded as a reference is, that takes no gradient."""
    if policy.sharding is None:
        return copy.deepcopy(policy).requires_grad_(False)
    with torch.device("meta"):
        lm = type(policy.lm)(copy.deepcopy(policy.lm.config))
    twin = PolicyModel(
        lm,
        temperature=policy.temperature,
        precision=policy.precision,
        attention=policy.attention,
        compiled=policy.compiled,
        rows=policy.layout.class_of if isinstance(policy.layout, Rows) else None,
    ).requires_grad_(False)
    shard(twin, policy.sharding.of_reference())
    twin.load_state_dict(policy.state_dict())
    return twin
