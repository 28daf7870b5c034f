"""Fresh trajectories for the optimiser steps: what a source collects at once is dealt out over `rollout.updates` of them."""

from __future__ import annotations

from collections import deque
from itertools import takewhile
from pathlib import Path

from tbrm.experience.collect import Collected, RolloutSource
from tbrm.experience.offline import FileSource
from tbrm.reporting.metrics import Phases
from tbrm.storage.kept import Kept
from tbrm.trajectories.trajectory import Trajectory


class Supply(Kept):
    """Collects when a step has nothing left to train on, with the weights of that moment."""

    def __init__(self, source: RolloutSource | FileSource, updates: int) -> None:
        self.source = source
        self.updates = updates
        self.waiting: deque[Collected] = deque()
        """What is collected and not trained on yet, one for each of the next steps; the source's position is that after
        them."""

    def collect(self, step: int, phases: Phases) -> Collected:
        """What update `step` is to train on for the first time."""
        if not self.waiting:
            self.waiting.extend(self.source.collect(step, phases).split(self.updates))
        return self.waiting.popleft()

    def rest_of_rollout(self) -> list[Trajectory]:
        """What waits of the rollout that the last step was given a part of."""
        return [t for part in takewhile(lambda part: not part.metrics, self.waiting) for t in part.trajectories]

    def settle(self, phases: Phases) -> None:
        """Returns when nothing is being collected."""

    def save(self, folder: Path) -> dict[str, str]:
        """What waits, and whatever else the source must know again beside its position."""
        self.source.save(folder, self.waiting)
        return {}

    def restore(self, folder: Path) -> None:
        self.waiting.extend(self.source.restore(folder))

    def close(self) -> None:
        """Ends what is being collected."""
