"""The frozen reference, pi_ref: a copy of the policy that is scored through the policy's own compute path."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from tbrm.data import ReferenceScore, ScoredBatch, Trajectory, TrajectoryBatch
from tbrm.model import PolicyModel


class ReferenceModel:
    """Scores each trajectory once per version of the reference; the score stays with the trajectory.

    A batch is scored as it is packed for the policy: the same products in the same order, so that while the two models
    are equal, log pi - log pi_ref is exactly 0.
    """

    def __init__(self, policy: PolicyModel) -> None:
        self.model = copy.deepcopy(policy).requires_grad_(False)
        self.version = 0

    def reset(self, policy: PolicyModel) -> None:
        """Makes the policy of this moment the reference; earlier scores become stale."""
        self.model.load_state_dict(policy.state_dict())
        self.version += 1

    def load(self, folder: Path, version: int) -> None:
        """Takes the weights that a checkpoint kept of the reference."""
        self.model.load(folder)
        self.version = version

    def has_scored(self, trajectory: Trajectory) -> bool:
        return trajectory.reference is not None and trajectory.reference.version == self.version

    @torch.no_grad()
    def fill_in(self, batch: TrajectoryBatch, trajectories: Sequence[Trajectory]) -> ScoredBatch:
        """The batch with its ref_logprobs and ref_values; scores those of its trajectories that are not yet."""
        if not all(map(self.has_scored, trajectories)):
            self._score(batch, trajectories)
        scores = [trajectory.reference for trajectory in trajectories]
        return ScoredBatch(
            **vars(batch),
            ref_logprobs=torch.cat([score.logprobs for score in scores if score]).to(batch.input_ids.device),
            ref_values=torch.stack([score.value for score in scores if score]).to(batch.input_ids.device),
        )

    def _score(self, batch: TrajectoryBatch, trajectories: Sequence[Trajectory]) -> None:
        stats = self.model(batch)
        logprobs, lse = stats.logprobs.cpu(), stats.lse.cpu()
        bounds = batch.cu_seqlens.tolist()
        for trajectory, start, end in zip(trajectories, bounds, bounds[1:], strict=False):
            if not self.has_scored(trajectory):
                value = lse[start] if end > start else torch.zeros(())
                trajectory.reference = ReferenceScore(self.version, logprobs[start:end].clone(), value.clone())
