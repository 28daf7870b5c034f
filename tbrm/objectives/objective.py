"""What an objective is: a loss per trajectory over per-token statistics. Objectives never see logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WrapValidator

from tbrm.registry import GIVEN

if TYPE_CHECKING:
    from torch import Tensor

    from tbrm.trajectories.batch import ScoredBatch
    from tbrm_kernels import TokenStats


_OR_AUTO = WrapValidator(lambda value, check: value if value == "auto" else check(value))
"""Of keys that hold a number, or `auto`: then training puts one in its place, before the objective is asked for anything."""
_AS_IT_IS = PlainSerializer(lambda value: value)


class TrajectoryLoss(NamedTuple):
    """What an objective makes of N trajectories."""

    loss: Tensor
    """[N], differentiable; the trainer takes the mean over all trajectories of a step."""
    residual: Tensor
    """[N], what should be zero; for the metrics."""


@dataclass(frozen=True)
class Step:
    """All N trajectories of a step, on the CPU: those of every process and every micro-batch."""

    rewards: Tensor
    """[N] float32, with the offset."""
    groups: Tensor
    """[N] int64: which trajectories answer the same problem."""
    lengths: Tensor
    """[N] int64: how many actions each has."""
    measured: Mapping[str, Tensor]
    """[N] each: what `measure` found."""
    learned: Tensor | None = None
    """[N], in rewards: what each prompt is worth, of an objective that `learns_value`."""


class Objective(ABC, BaseModel):
    """Base of all objectives. The fields are the keys of the recipe's `objective` section.

    A step's trajectories are dealt out to processes, micro-batches and chunks of the head, and `__call__` is given one such
    part. What is to look at other trajectories (a baseline, a group's mean) is a column, made of the whole step: so a loss
    does not depend on how the step was dealt out. The trainer checks that as a run begins.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    name: str = Field(
        GIVEN,
        description="Which loss: tbrm, reval, brm, tba, optimal, rloo, reinforce, grpo, ppo, package.module:Class, or given, "
        "an object (docs/python.md).",
    )
    beta: Annotated[float, Field(gt=0), _OR_AUTO, _AS_IT_IS] = Field(
        description="Temperature of the KL-regularised problem: maximise E[R] - beta KL(pi || pi_ref). auto: a hundredth of "
        "how far rewards are apart, and more where responses go further from the reference than kl_target."
    )
    kl_target: float = Field(
        10.0,
        gt=0,
        description="With beta: auto, how far from the reference responses may go before beta rises, nats each.",
    )
    reward_offset: Annotated[float, _OR_AUTO, _AS_IT_IS] = Field(
        0.0,
        description="What is added to each reward: the best policy stays, V(s_1) rises by offset / beta. auto: such that the "
        "mean of R/beta starts a little above V(s_1) where that is wanted (tbrm, brm); else 0.",
    )
    reset_reference_every: int = Field(
        0, ge=0, description="Steps after which the reference becomes a copy of the policy; 0: never."
    )

    @property
    def wants_reward_above_value(self) -> bool:
        """Whether V(s_1) itself is fitted to R/beta: then the mean of R/beta must not begin below it, which is looked at."""
        return False

    @property
    def wants_behaviour(self) -> bool:
        """Whether `batch.behaviour_logprobs` is read: where nobody said what sampled a trajectory, the policy's own as the step
        begins stand for it, which takes a forward pass."""
        return False

    @property
    def learns_value(self) -> bool:
        """Whether the value of the prompt is learnt beside the policy, for `columns` to take off the rewards: it is fitted to
        what would have made each residual zero."""
        return False

    @property
    def has_critic(self) -> bool:
        """Whether a model of its own learns the value of each token, beside the policy: as `tbrm.objectives.ppo.Ppo`."""
        return False

    @property
    def takes_ratios(self) -> bool:
        """Whether it compares the policy with `batch.old_logprobs`, and lets tokens weigh `batch.importance`."""
        return False

    @property
    def wants_several_responses(self) -> str | None:
        """The key, if any, with which all rewards are 0 where every problem has a single response."""
        return None

    def require_objects(self) -> None:
        """As `Task.require_objects`."""

    @property
    def measures(self) -> bool:
        """Whether `measure` is asked: by default, if it is there. It costs one more forward pass a step."""
        return type(self).measure is not Objective.measure

    def measure(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        """What `columns` wants to know of each of the batch's n trajectories under the policy as it is, [n] each, without
        gradient."""
        return {}

    def columns(self, step: Step) -> dict[str, Tensor]:
        """[N] each, detached, that `__call__` finds in `batch.columns`: by default the rewards alone."""
        return {"rewards": step.rewards}

    @abstractmethod
    def __call__(self, stats: TokenStats, batch: ScoredBatch) -> TrajectoryLoss:
        """The loss of each trajectory of a packed batch, of its own tokens and columns alone."""

    def figures(self, stats: TokenStats, batch: ScoredBatch) -> dict[str, Tensor]:
        """Metrics of its own, without gradient: sums over the actions of each trajectory, [N] each, of which the step's mean
        over all actions is shown."""
        return {}


def log_ratio(stats: TokenStats, batch: ScoredBatch) -> Tensor:
    """[N]: sum_h log pi(a_h|s_h) - log pi_ref(a_h|s_h)."""
    from tbrm_kernels import segment_sums

    return segment_sums(stats.logprobs - batch.ref_logprobs, batch.cu_seqlens)


def surprise(stats: TokenStats, batch: ScoredBatch) -> Tensor:
    """[N]: sum_h (1 - pi(a_h|s_h)), which stands for the squared norm of the score."""
    from tbrm_kernels import segment_sums

    return segment_sums(1 - stats.logprobs.exp(), batch.cu_seqlens)


def comparable(groups: Tensor) -> Tensor:
    """The groups [N] within which responses are compared: those given, or, where each is of one, all as a single one."""
    return groups.new_zeros(len(groups)) if len(groups.unique()) == len(groups) else groups


def group_means(values: Tensor, groups: Tensor) -> Tensor:
    """[N]: for each of `values` [N] the mean over its group; groups [N] int64."""
    _, member = groups.unique(return_inverse=True)
    counts = member.bincount()
    means = values.new_zeros(len(counts)).index_add_(0, member, values) / counts
    return means[member]


def group_sizes(groups: Tensor) -> Tensor:
    """[N] int64: how many the group of each is of."""
    _, member = groups.unique(return_inverse=True)
    return member.bincount()[member]


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """[] of [N] each; the plain mean where nothing weighs anything."""
    weights = weights.clamp(min=0)
    if not weights.sum() > 0:  # all are sure of every token, or there are none
        weights = weights + 1
    return (weights * values).sum() / weights.sum()
