"""What an objective is: a loss per trajectory over per-token statistics. Objectives never see logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tbrm.data import ScoredBatch
from tbrm_kernels import TokenStats


class TrajectoryLoss(NamedTuple):
    loss: Tensor  # [N], differentiable; the trainer takes the mean over all trajectories of a step
    residual: Tensor  # [N], what should be zero; for the metrics


class Objective(ABC, BaseModel):
    """Base of all objectives. The fields are the keys of the recipe's `objective` section."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(description="Which loss: tbrm, reval, brm, tba, reinforce, or package.module:Class.")
    beta: float = Field(
        gt=0, description="Temperature of the KL-regularised problem: maximise E[R] - beta KL(pi || pi_ref)."
    )
    reward_offset: float = Field(
        0.0,
        description="Added to each reward: the best policy stays, V(s_1) rises by offset / beta. For tbrm, choose it so that "
        "the mean of R/beta starts a little above the metric value_mean.",
    )
    reset_reference_every: int = Field(
        0, ge=0, description="Steps after which the reference becomes a copy of the policy; 0: never."
    )

    uses_log_ratios: ClassVar[bool] = False
    """Whether `compare` is to be asked before each update, at the price of one more forward pass."""

    def shape_rewards(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """The rewards [N] that the loss is to use, of those with the offset; groups [N] int64 says which trajectories
        answer the same problem."""
        return rewards

    def compare(self, rewards: Tensor, groups: Tensor, log_ratios: Tensor) -> Tensor:
        """The rewards [N] that the loss is to use, where that takes the log-ratios [N] of all trajectories of the step:
        sum_h log pi(a_h|s_h) - log pi_ref(a_h|s_h) under the policy as it is."""
        return rewards

    @abstractmethod
    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        """The loss of each trajectory of a packed batch."""


def comparable(groups: Tensor) -> Tensor:
    """The groups [N] within which responses are compared: those given, or, where each is of one, all as a single one."""
    return torch.zeros_like(groups) if len(torch.unique(groups)) == len(groups) else groups


def group_means(values: Tensor, groups: Tensor) -> Tensor:
    """[N]: for each of `values` [N] the mean over its group; groups [N] int64."""
    _, member = torch.unique(groups, return_inverse=True)
    counts = torch.bincount(member)
    means = torch.zeros(len(counts), dtype=values.dtype).index_add_(0, member, values) / counts
    return means[member]
