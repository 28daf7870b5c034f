"""The product's objectives on many worlds at once: their own `measure`, `columns` and `__call__`, unchanged.

The trajectories of all worlds are packed one after the other. That is sound for `measure` and `__call__`, whose answers are
each trajectory's own (tbrm.objectives.contract holds them to it). `columns` looks at a whole step, which is one world's: it is
called for each world, or for all at once, their groups apart, where that is seen to give the same.

Letters: W worlds, M trajectories a step of each, H tokens a trajectory, A to choose from; N = W M, T = N H.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bench.microcosm.learned import LearnedValues
from tbrm.objectives import Objective, Step
from tbrm.trajectories.batch import Inputs, ScoredBatch
from tbrm_kernels import TokenStats, segment_sums

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Rollout:
    """What was drawn, and what was said of it, in all worlds."""

    features: Tensor  # [W, H * M, F]
    actions: Tensor  # [W, H, M]
    rewards: Tensor  # [W, M]
    groups: Tensor  # [M] int64: which trajectories answer the same prompt; alike in all worlds
    behaviour: ExactStats  # of the policy that drew them
    reference: ExactStats
    states: Tensor  # [W, M, U]: the reference's hidden state of each prompt
    number: int = 0
    """Which rollout of the run it is."""


class ExactStats(NamedTuple):
    """TokenStats, and what the kernels do not say: of a few tokens it is easily had."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor | None
    sum_sq_probs: Tensor
    """sum_v pi(v|s)^2."""


def statistics(logits: Tensor, actions: Tensor) -> ExactStats:
    """[T] each, of logits [W, A, H * M] and actions [W, H, M]."""
    worlds, places, count = actions.shape
    logs = logits.log_softmax(1)
    logprobs = logs.gather(1, actions.view(worlds, 1, -1))[:, 0]
    probs = logs.exp()
    found = (logprobs, logits[:, 0] - logs[:, 0], -(probs * logs).sum(1), probs.square().sum(1))
    return ExactStats(*(values.view(worlds, places, count).mT.reshape(-1) for values in found))


class Learner:
    """An objective, and the gradient that it gives in each world."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._values = LearnedValues() if objective.learns_value else None
        self._at_once: bool | None = None

    def by_logits(self, logits: Tensor, rollout: Rollout) -> Tensor:
        """[W, A, H * M]: the derivatives, by the logits, of each world's mean loss over its trajectories."""
        logits = logits.detach().requires_grad_()
        stats = statistics(logits, rollout.actions)
        batch = packed(rollout, {"rewards": rollout.rewards.flatten() + self.objective.reward_offset})
        with torch.no_grad():
            measured = self.objective.measure(_known(stats), batch)
            learned = self._learned(batch, rollout)
            batch = replace(batch, columns=self.columns(batch.rewards, rollout, measured, learned))
        losses = self.objective(_known(stats), batch)
        if self._values and learned is not None:  # from what would have made each residual zero, as the trainer does
            targets = (learned - self.objective.beta * losses.residual.detach()).view(rollout.rewards.shape)
            self._values.learn(rollout.number, rollout.states, targets, _surprise(batch, rollout))
        return torch.autograd.grad(losses.loss.sum() / rollout.rewards.shape[1], logits)[0]

    def _learned(self, batch: ScoredBatch, rollout: Rollout) -> Tensor | None:
        """[N]: what each prompt is worth, if that is learnt."""
        if self._values is None:
            return None
        rewards = batch.rewards.view(rollout.rewards.shape)
        return self._values(rollout.states, rewards, _surprise(batch, rollout)).flatten()

    def columns(self, rewards: Tensor, rollout: Rollout, measured: Columns, learned: Tensor | None = None) -> Columns:
        """[N] each: every world's columns of its own step."""
        if self._at_once is None:
            chance = torch.Generator().manual_seed(0)
            probe = [torch.rand(rewards.shape, generator=chance).to(rewards) for _ in range(1 + len(measured))]
            others = dict(zip(measured, probe[1:], strict=True))
            one_by_one, at_once = (way(probe[0], rollout, others, learned) for way in (self._of_each, self._of_all))
            self._at_once = all(torch.allclose(at_once[name], column) for name, column in one_by_one.items())
        return (self._of_all if self._at_once else self._of_each)(rewards, rollout, measured, learned)

    def _of_all(self, rewards: Tensor, rollout: Rollout, measured: Columns, learned: Tensor | None) -> Columns:
        worlds, count, lengths = _sizes(rollout)
        # Where each prompt has one response a world's step is what they are compared within.
        alone = len(rollout.groups.unique()) == count
        groups = torch.arange(worlds)[:, None] * count + (torch.zeros_like(rollout.groups) if alone else rollout.groups)
        return self.objective.columns(Step(rewards, groups.flatten(), lengths.repeat(worlds), measured, learned))

    def _of_each(self, rewards: Tensor, rollout: Rollout, measured: Columns, learned: Tensor | None) -> Columns:
        worlds, count, lengths = _sizes(rollout)
        found = []
        for world in range(worlds):
            part = slice(world * count, (world + 1) * count)
            its = {name: values[part] for name, values in measured.items()}
            worth = None if learned is None else learned[part]
            found.append(self.objective.columns(Step(rewards[part], rollout.groups, lengths, its, worth)))
        return {name: torch.cat([columns[name] for columns in found]) for name in found[0]}


def _known(stats: ExactStats) -> TokenStats:
    """The same, which has all that an objective asks of TokenStats."""
    return cast(TokenStats, stats)


def _sizes(rollout: Rollout) -> tuple[int, int, Tensor]:
    worlds, places, count = rollout.actions.shape
    return worlds, count, torch.full((count,), places)


def _surprise(batch: ScoredBatch, rollout: Rollout) -> Tensor:
    """[W, M]: sum_h (1 - mu(a_h|s_h))."""
    return segment_sums(1 - batch.behaviour_logprobs.exp(), batch.cu_seqlens).view(rollout.rewards.shape)


def packed(rollout: Rollout, columns: Columns) -> ScoredBatch:
    """All worlds' trajectories; of hidden states there are none."""
    places = rollout.actions.shape[1]
    bounds = tuple(range(0, rollout.actions.numel() + 1, places))
    return ScoredBatch(
        inputs=cast(Inputs, None),
        targets=rollout.actions.mT.reshape(-1),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        bounds=bounds,
        ref_logprobs=rollout.reference.logprobs,
        ref_values=rollout.reference.lse[::places],
        behaviour_logprobs=rollout.behaviour.logprobs,
        columns=columns,
    )
