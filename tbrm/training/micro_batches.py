"""The trajectories of a step, in the parts that run forward and backward at once, and the columns of the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tbrm.objectives import Step
from tbrm.objectives.contract import Contract
from tbrm.parallel import World
from tbrm.policy.model import PolicyModel
from tbrm.policy.reference import ReferenceModel
from tbrm.training.own_logprobs import own_logprobs
from tbrm.trajectories.batch import ScoredBatch
from tbrm.trajectories.trajectory import Trajectory


class MicroBatches:
    """Those of this process, of at most `max_tokens` each. What the reference has scored stands apart from what it has not, so
    that nothing is scored twice."""

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        reference: ReferenceModel,
        max_tokens: int,
        world: World,
        weight_cap: float | None = None,
    ) -> None:
        """`weight_cap`: of importance weights, if there are to be any."""
        self.trajectories = trajectories
        self.weight_cap = weight_cap
        self._reference = reference
        self._world = world
        self._unscored = self._dealt(max_tokens, scored=False)
        self.members = self._unscored + self._dealt(max_tokens, scored=True)
        """Indices of the trajectories of each."""
        self.metrics: dict[str, float] = {}
        self.of_actions: list[dict[str, Tensor]] = []
        """What a critic made of each trajectory, if there is one, [H] each."""
        self._own: dict[int, Tensor] = {}
        """The policy's log-probs of trajectories of which nobody said with which they were sampled."""

    def _dealt(self, max_tokens: int, *, scored: bool) -> list[list[int]]:
        indices = [i for i, t in enumerate(self.trajectories) if self._reference.has_scored(t) is scored]
        layout = self._reference.model.layout
        dealt = layout.split([self.trajectories[i] for i in indices], max_tokens, self._world.size)
        return [[indices[i] for i in members] for members in dealt[self._world.rank]]

    @property
    def order(self) -> list[int]:
        """The trajectories of this process, as they come."""
        return [i for members in self.members for i in members]

    def score(self) -> None:
        """By the reference, what it has not scored."""
        for members in self._unscored:
            part = [self.trajectories[i] for i in members]
            model = self._reference.model
            self._reference.score(model.layout.pack(part).to(model.device), part)

    def share_scores(self) -> None:
        """With the other processes: one of them may get the same trajectories next."""
        scored_here = [i for members in self._unscored for i in members]
        self._reference.share_scores(self.trajectories, scored_here, self._world)

    def batch(self, members: list[int], columns: dict[str, Tensor]) -> ScoredBatch:
        """Some of the step's trajectories, with their part of its columns [N]."""
        part = {name: column[members] for name, column in columns.items()}
        behaviour = [self._behaviour(i) for i in members]
        scored = self._reference.scored([self.trajectories[i] for i in members], behaviour, part)
        if self.of_actions:
            names, nothing = self.of_actions[0], torch.zeros(0)
            found = {name: torch.cat([nothing, *(self.of_actions[i][name] for i in members)]) for name in names}
            scored = replace(scored, of_actions=found)
        return self._weighted(scored, members).to(self._reference.model.device)

    def _weighted(self, batch: ScoredBatch, members: list[int]) -> ScoredBatch:
        """With its importance weights: 1 where we were not there, or the engine said nothing."""
        if self.weight_cap is None:
            return batch
        old, gaps = [torch.zeros(0)], [torch.zeros(0)]
        for i in members:
            ours, said = self.trajectories[i].old_logprobs, self.trajectories[i].behaviour_logprobs
            old.append(self._behaviour(i) if ours is None else ours)
            gaps.append(torch.zeros_like(old[-1]) if ours is None or said is None else ours - said)
        importance = torch.cat(gaps).exp().clamp(max=self.weight_cap)
        return replace(batch, own_old_logprobs=torch.cat(old), importance=importance)

    def columns(self, objective: Contract, policy: PolicyModel, learned: Tensor | None) -> dict[str, Tensor]:
        """The objective's columns [N] of all trajectories of the step, of which this process has some in its micro-batches;
        `learned` [N]: what their prompts are worth, if that is learnt."""
        if not self.trajectories:
            return {}
        rewards = torch.tensor([t.reward for t in self.trajectories]) + objective.objective.reward_offset
        groups = torch.tensor([t.group for t in self.trajectories], dtype=torch.int64)
        lengths = torch.tensor([len(t.actions) for t in self.trajectories], dtype=torch.int64)
        if objective.wants_behaviour:
            self._take_own_for_unsaid(policy)
        measured = self._measure(objective, policy, rewards) if objective.measures else {}
        return objective.columns(Step(rewards, groups, lengths, measured, learned))

    def _behaviour(self, index: int) -> Tensor:
        said = self.trajectories[index].behaviour_logprobs
        if said is not None:
            return said
        return self._own.get(index, torch.full((len(self.trajectories[index].actions),), torch.nan))

    def _take_own_for_unsaid(self, policy: PolicyModel) -> None:
        unsaid = sum(t.behaviour_logprobs is None for t in self.trajectories)
        self.metrics["behaviour_unsaid"] = unsaid
        if unsaid:
            self._own = own_logprobs(policy, self.trajectories, self.members)

    @torch.no_grad()
    def _measure(self, objective: Contract, policy: PolicyModel, rewards: Tensor) -> dict[str, Tensor]:
        found: list[tuple[list[int], dict[str, Tensor]]] = []
        for members in self.members:
            batch = self.batch(members, {"rewards": rewards})
            stats = policy(batch, entropy=True)  # by all processes together, whoever has something to measure
            if members:
                values = objective.measure(stats, batch)
                found.append((members, {name: column.cpu() for name, column in values.items()}))
        everywhere = [part for parts in self._world.gather(found) for part in parts]
        place = torch.tensor([i for members, _ in everywhere for i in members]).argsort()
        return {name: torch.cat([values[name] for _, values in everywhere])[place] for name in everywhere[0][1]}
