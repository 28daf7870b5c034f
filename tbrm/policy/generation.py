"""A policy as the transformers model that it is made of: what generates with it needs that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tbrm.policy.compiled import not_compiled
from tbrm.policy.model import PolicyModel


@contextmanager
def generation_mode(policy: PolicyModel, attention: str | None = None) -> Iterator[PreTrainedModel]:
    """The transformers model with its usual attention, or that of the given name; on every process all of it."""
    policy.lm.set_attn_implementation(attention or policy.plain_attention)
    try:
        with ExitStack() as stack:
            stack.enter_context(policy.autocast())
            stack.enter_context(not_compiled())
            if policy.sharding is not None:
                stack.enter_context(policy.sharding.gathered(policy))
            if policy.vocabulary is not None:
                stack.enter_context(policy.vocabulary.gathered(policy.precision, policy.device))
            yield policy.lm
    finally:
        policy.lm.set_attn_implementation(policy.attention)


def logits_of(policy: PolicyModel, hidden: Tensor) -> Tensor:
    """[..., V] of last hidden states [..., D], as the model itself computes them, in generation mode."""
    logits: Tensor = policy.lm.get_output_embeddings()(hidden)
    if policy.logit_scale != 1.0:
        logits = logits * policy.logit_scale
    return logits if policy.softcap is None else policy.softcap * torch.tanh(logits / policy.softcap)
