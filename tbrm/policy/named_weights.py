"""The weights of a policy by the names that they have on disk."""

from __future__ import annotations

from torch import nn

from tbrm.policy.lora import is_adapter, saved_name
from tbrm.policy.model import PolicyModel


def weights_of(policy: PolicyModel) -> dict[str, nn.Parameter]:
    """Every weight of the transformers model once, by the first of its names: a tied head goes by the embedding's. Buffers
    that are saved (a router's correction bias) are among them, adapters are not."""
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for name, weight in _state(policy).items():
        if not is_adapter(name):
            named.setdefault(id(weight), (name.replace(".base_layer.", "."), weight))
    return dict(named.values())


def saved_weights(policy: PolicyModel) -> dict[str, nn.Parameter]:
    """What a checkpoint holds: all weights or, where there are adapters, those of the adapters alone, by peft's names."""
    if policy.adapters is None:
        return weights_of(policy)
    return {saved_name(name): weight for name, weight in _state(policy).items() if is_adapter(name)}


def trained_weights(policy: PolicyModel) -> dict[str, nn.Parameter]:
    """Those of them that learn."""
    return {name: weight for name, weight in saved_weights(policy).items() if weight.requires_grad}


def _state(policy: PolicyModel) -> dict[str, nn.Parameter]:
    # Not named_parameters: this has the names without wrappers, and slices where the weights are gathered just now.
    return {name.removeprefix("lm."): weight for name, weight in policy.state_dict(keep_vars=True).items()}
