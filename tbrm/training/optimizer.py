"""The optimiser: AdamW, which decays matrices alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tbrm.config.training import OptimConfig
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import trained_weights


def make_optimizer(policy: PolicyModel, config: OptimConfig) -> torch.optim.AdamW:
    """A norm's gain belongs near 1 and a bias where it is: neither is drawn to 0."""
    left_alone = set(_gains_and_biases(policy))
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for weight in trained_weights(policy).values():
        groups[weight in left_alone or weight.dim() <= 1].append(weight)
    decays = (config.weight_decay, 0.0)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True) if group],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def _gains_and_biases(model: nn.Module) -> Iterator[nn.Parameter]:
    """By their names, since their dimensions do not tell: a gain may be [heads, D], the biases of experts are [experts, D]."""
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, weight in module.named_parameters(recurse=False):
            if is_norm or name.endswith("bias"):
                yield weight
