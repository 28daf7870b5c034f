"""The optimiser: AdamW, which decays matrices alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tbrm.config import OptimConfig


def make_optimizer(weights: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """A norm's gain belongs near 1 and a bias where it is: neither is drawn to 0."""
    weights = list(weights)
    matrices = {"params": [weight for weight in weights if weight.dim() > 1]}
    vectors = {"params": [weight for weight in weights if weight.dim() <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW(
        [group for group in (matrices, vectors) if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
