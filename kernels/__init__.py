"""Kernels for Trajectory Bellman Residual Minimization (arXiv 2505.15311), usable in any PyTorch trainer.

The model's logits are its Q-values, and what an objective needs of them is three numbers per token: the log-probability
of the token taken, the log-sum-exp (the soft value V of the state) and the entropy. `linear_token_stats` computes these
from the last hidden states and the head's weight, differentiably, without ever holding the [T, V] logits.
`fused_linear_tbrm_loss` and `fused_linear_trajectory_loss` go from there to the loss and its gradients in a single pass.
"""

from __future__ import annotations

from .backends.registry import backends
from .tbrm_loss import TbrmOutput, fused_linear_tbrm_loss
from .token_stats import TokenStats, linear_token_stats
from .trajectory import segment_sums, trajectory_residual
from .trajectory_loss import TrajectoryLossFn, fused_linear_trajectory_loss

__all__ = [
    "TbrmOutput",
    "TokenStats",
    "TrajectoryLossFn",
    "backends",
    "fused_linear_tbrm_loss",
    "fused_linear_trajectory_loss",
    "linear_token_stats",
    "segment_sums",
    "trajectory_residual",
]
