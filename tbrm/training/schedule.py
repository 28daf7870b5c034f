"""The learning rate over a run."""

from __future__ import annotations

import math

from tbrm.config.training import OptimConfig


def learning_rate_at(step: int, optim: OptimConfig, steps: int) -> float:
    """The learning rate of update `step`, counted from 1."""
    if step <= optim.warmup_steps:
        return optim.learning_rate * step / optim.warmup_steps
    done = (step - 1 - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[optim.schedule]
    return optim.learning_rate * factor
