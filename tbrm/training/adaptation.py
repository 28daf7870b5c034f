"""What of an objective is found as it trains, from what its steps show: the value of a prompt, and what `auto` stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tbrm.objectives.contract import Contract
from tbrm.objectives.objective import weighted_mean
from tbrm.policy.reference import ReferenceModel
from tbrm.storage.kept import Kept
from tbrm.training.auto import Auto
from tbrm.training.learned_value import LearnedValue
from tbrm.training.step_metrics import OfEach
from tbrm.trajectories.trajectory import ReferenceScore, Trajectory


class Adaptation(Kept):
    """All processes call it with the same, and find the same."""

    def __init__(self, contract: Contract, reference: ReferenceModel, found: dict[str, float]) -> None:
        """`found` is filled with what `auto` came to."""
        self._contract = contract
        self._auto = Auto(contract.objective, found)
        self._reference = reference
        self._value = LearnedValue() if contract.objective.learns_value else None
        self._learned = torch.zeros(0)
        """What each prompt of the step is worth."""
        reference.keeps_states = self._value is not None

    @property
    def reads_scores(self) -> bool:
        """Whether it looks at what the reference says of all of a step's trajectories."""
        return self._value is not None or self._auto.wants_values

    def before(self, trajectories: Sequence[Trajectory]) -> Tensor | None:
        """Puts numbers into the objective; returns what each of the step's prompts is worth, [N] in rewards, if learnt."""
        values = [_score(t).value.item() for t in trajectories] if self._auto.wants_values else []
        self._contract.objective = self._auto.numbers([t.reward for t in trajectories], values)
        if self._value is None or not trajectories:
            return None
        learned = self._value(_states(trajectories), self._reference.version)
        self._learned = self._first_value(trajectories) if learned is None else learned
        return self._learned

    def after(self, step: int, trajectories: Sequence[Trajectory], found: OfEach) -> dict[str, float]:
        """Learns from what the step's trajectories came to; returns what to log."""
        if not trajectories:
            return {}
        newest = max((t.weight_version for t in trajectories if t.weight_version is not None), default=None)
        own = torch.tensor([newest is not None and t.weight_version == newest for t in trajectories])
        if own.any() and (kl := found.log_ratio[own].mean()).isfinite():
            self._auto.look(kl.item())
        return self._auto.metrics(self._contract.objective) | self._learn(step, trajectories, found)

    def _learn(self, step: int, trajectories: Sequence[Trajectory], found: OfEach) -> dict[str, float]:
        if self._value is None:
            return {}
        targets, weights = self._learned.double() - self._contract.objective.beta * found.residual, found.surprise
        groups = torch.tensor([t.group for t in trajectories], dtype=torch.int64)
        self._value.learn(step, _states(trajectories), targets, weights, groups, self._reference.version)
        return {
            "learned_value_mean": self._learned.mean().item(),
            "learned_value_explains": _explained(targets, self._learned.double(), weights),
        }

    def _first_value(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """Where nothing was seen yet the policy is the reference, so that the value `optimal` is the rewards' weighted mean."""
        rewards = torch.tensor([t.reward for t in trajectories]) + self._contract.objective.reward_offset
        said = [_score(t).logprobs if t.behaviour_logprobs is None else t.behaviour_logprobs for t in trajectories]
        weights = torch.stack([(1 - logprobs.exp()).sum() for logprobs in said])
        return weighted_mean(rewards, weights).expand(len(rewards))

    def save(self, folder: Path) -> Mapping[str, str]:
        return self._value.save(folder) if self._value else {}

    def restore(self, folder: Path) -> None:
        if self._value:
            self._value.restore(folder)


def _score(trajectory: Trajectory) -> ReferenceScore:
    assert trajectory.reference is not None
    return trajectory.reference


def _states(trajectories: Sequence[Trajectory]) -> Tensor:
    states = [_score(trajectory).state for trajectory in trajectories]
    return torch.stack([state for state in states if state is not None])


def _explained(targets: Tensor, said: Tensor, weights: Tensor) -> float:
    """The share of the targets' weighted variance about their own mean that is not left about what was said: 1 at best, below
    0 where their mean would have been nearer."""
    spread = (weights * (targets - weighted_mean(targets, weights)).square()).sum()
    left = (weights * (targets - said).square()).sum()
    return (1 - left / spread).item() if spread > 0 else 0.0
