"""The frozen reference, pi_ref: a copy of the policy, or the policy without its adapters, which scores through the policy's own
compute path."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from tbrm.parallel import World
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import weights_of
from tbrm.policy.sharded import frozen_copy
from tbrm.policy.weights import detached, read_weights
from tbrm.storage.kept import Kept
from tbrm.trajectories.batch import ScoredBatch, TrajectoryBatch
from tbrm.trajectories.trajectory import ReferenceScore, Trajectory


class ReferenceModel(Kept):
    """Scores each trajectory once per version of the reference; the score stays with the trajectory.

    A batch is scored as it is packed for the policy: the same products in the same order, so that while the two models
    are equal, log pi - log pi_ref is exactly 0.
    """

    def __init__(self, policy: PolicyModel) -> None:
        self._adapters = policy.adapters
        self.model = frozen_copy(policy) if policy.adapters is None else policy
        self.version = 0
        """Of its scores."""
        self.moved = False
        """Whether its weights are others than those that the policy was loaded with."""
        self.keeps_states = False
        """Whether its scores have the hidden state of the prompt."""

    def reset(self, policy: PolicyModel) -> None:
        """Makes the policy of this moment the reference; earlier scores become stale."""
        self.model.load_state_dict(policy.state_dict())
        self.version += 1
        self.moved = True

    def tensors(self) -> dict[str, Tensor]:
        """One that was never reset is the model as it was first loaded, which every resumed run loads."""
        return detached(weights_of(self.model)) if self.moved else {}

    def restore(self, folder: Path) -> None:
        if folder.exists() and self._adapters is None:
            read_weights(weights_of(self.model), folder)
            self.moved = True

    def has_scored(self, trajectory: Trajectory) -> bool:
        score = trajectory.reference
        return score is not None and score.version == self.version and not (self.keeps_states and score.state is None)

    @torch.no_grad()
    def score(self, batch: TrajectoryBatch, trajectories: Sequence[Trajectory]) -> None:
        """Scores the trajectories of the batch. Where the model is sharded, all processes must call this together."""
        seen: list[Tensor] = []
        with self._adapters.off() if self._adapters else nullcontext():
            stats = self.model(batch, see=seen.append if self.keeps_states else None)
        if self._adapters is None and self.model.sharding is not None:
            self.model.sharding.reshard(self.model)  # no backward pass does
        logprobs, lse = stats.logprobs.cpu(), stats.lse.cpu()
        starts = [start for start, end in pairwise(batch.bounds) if end > start]
        states = iter(seen[0][starts].float().cpu() if seen else ())
        for trajectory, start, end in zip(trajectories, batch.bounds, batch.bounds[1:], strict=False):
            value = lse[start] if end > start else torch.zeros(())
            state = next(states).clone() if seen and end > start else None
            trajectory.reference = ReferenceScore(self.version, logprobs[start:end].clone(), value.clone(), state)

    def scored(
        self, trajectories: Sequence[Trajectory], behaviour: Sequence[Tensor], columns: dict[str, Tensor]
    ) -> ScoredBatch:
        """The trajectories, laid out, with what `score` has found of them, log mu of the actions of each, and the objective's
        columns [N]."""
        scores = [trajectory.reference for trajectory in trajectories]
        nothing = torch.zeros(0)  # a share of the step may be empty
        return ScoredBatch(
            **vars(self.model.layout.pack(trajectories)),
            ref_logprobs=torch.cat([nothing, *(score.logprobs for score in scores if score)]),
            ref_values=torch.cat([nothing, *(score.value[None] for score in scores if score)]),
            behaviour_logprobs=torch.cat([nothing, *behaviour]),
            columns=columns,
        )

    def share_scores(self, trajectories: Sequence[Trajectory], scored_here: Sequence[int], world: World) -> None:
        """Gives all processes the scores of those `trajectories` that this one has scored: another may get them next."""
        for scores in world.gather({i: trajectories[i].reference for i in scored_here}):
            for i, score in scores.items():
                trajectories[i].reference = score
