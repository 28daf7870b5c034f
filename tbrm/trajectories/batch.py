"""Trajectories as the model computes with them: laid out as tokens, and, whatever the layout, their actions in a row.

Letters: N trajectories, T tokens, A actions (response tokens that the policy chose), D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Inputs(Protocol):
    """What a layout makes of trajectories for the backbone to read."""

    @property
    def input_ids(self) -> Tensor:
        """[T] int64: all tokens that it reads, in the order in which they are embedded."""
        ...

    def to(self, device: torch.device | str) -> Self: ...

    def run(self, lm: PreTrainedModel, embedded: Tensor | None = None) -> Tensor:
        """[A, D]: the hidden states that predict the actions, in the order of the batch's targets. `embedded` [T, D]: what the
        embedding says of the tokens, where `lm` does not hold all of it."""
        ...


@dataclass(frozen=True)
class TrajectoryBatch:
    """Trajectories, ready for the model. Move it with `to`."""

    inputs: Inputs
    targets: Tensor  # [A] int64: the action
    cu_seqlens: Tensor  # [N+1] int32: trajectory i owns actions cu_seqlens[i]:cu_seqlens[i+1]
    bounds: tuple[int, ...]
    """The same as cu_seqlens, which a GPU would have to be waited for to read."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return replace(self, inputs=self.inputs.to(device), **moved(self, device))

    def values(self, lse: Tensor) -> Tensor:
        """[N]: V(s_1), the `lse` [A] at the first action of each trajectory; every one must have an action."""
        return lse[self.cu_seqlens[:-1].long()]


def backbone(lm: PreTrainedModel) -> Any:
    """The model without its head. Llama 4's text model has it under another name than it says."""
    return lm.model if lm.base_model is lm else lm.base_model


def moved(thing: object, device: torch.device | str) -> dict[str, Any]:
    """A dataclass's own tensors, on the device."""
    return {k: v.to(device, non_blocking=True) for k, v in vars(thing).items() if isinstance(v, Tensor)}


@dataclass(frozen=True)
class ScoredBatch(TrajectoryBatch):
    """A batch with what the reference and whoever made it say of it, and the objective's columns."""

    ref_logprobs: Tensor
    """[A] float32: log pi_ref of each action."""
    ref_values: Tensor
    """[N] float32: V_ref(s_1), 0 for a trajectory without actions."""
    behaviour_logprobs: Tensor
    """[A] float32: log mu of each action under what sampled it; NaN where nobody said, unless the objective
    `wants_behaviour`."""
    columns: dict[str, Tensor]
    """[N] each: what the objective's `columns` made of the step."""
    of_actions: dict[str, Tensor] = field(default_factory=dict)
    """[A] each: what a critic made of the step."""
    own_old_logprobs: Tensor | None = None
    """[A] float32: with `rollout.importance`, log pi of each action as its rollout came in."""
    importance: Tensor | None = None
    """[A] float32: with `rollout.importance`, what each action weighs: pi of that moment / mu, up to the cap."""

    @property
    def old_logprobs(self) -> Tensor:
        """[A]: what ratios are taken to."""
        return self.behaviour_logprobs if self.own_old_logprobs is None else self.own_old_logprobs

    @property
    def rewards(self) -> Tensor:
        """[N]: the column that most objectives have."""
        if "rewards" not in self.columns:
            raise ValueError(
                f"the objective reads batch.rewards, and its `columns` gave {sorted(self.columns)}: have it give 'rewards', too"
            )
        return self.columns["rewards"]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        columns, of_actions = (
            {name: column.to(device, non_blocking=True) for name, column in part.items()}
            for part in (self.columns, self.of_actions)
        )
        return replace(super().to(device), columns=columns, of_actions=of_actions)

    def scores_of(self, first: int, cu_seqlens: Tensor) -> Self:
        """The same batch, with the actions, columns and scores of some trajectories alone: as many as `cu_seqlens` bounds,
        from `first` on."""
        trajectories = slice(first, first + len(cu_seqlens) - 1)
        bounds = self.bounds[first : trajectories.stop + 1]
        start, stop = bounds[0], bounds[-1]
        return replace(
            self,
            targets=self.targets[start:stop],
            cu_seqlens=cu_seqlens,
            bounds=tuple(bound - start for bound in bounds),
            ref_logprobs=self.ref_logprobs[start:stop],
            ref_values=self.ref_values[trajectories],
            behaviour_logprobs=self.behaviour_logprobs[start:stop],
            columns={name: column[trajectories] for name, column in self.columns.items()},
            of_actions={name: column[start:stop] for name, column in self.of_actions.items()},
            own_old_logprobs=None if self.own_old_logprobs is None else self.own_old_logprobs[start:stop],
            importance=None if self.importance is None else self.importance[start:stop],
        )
