"""The replay buffer: trajectories need no importance ratio in TBRM, so old ones may be used again."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

from tbrm.data import Trajectory


class ReplayBuffer:
    """First in, first out, sampled uniformly without replacement."""

    def __init__(self, capacity: int) -> None:
        self.trajectories: deque[Trajectory] = deque(maxlen=capacity)

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        self.trajectories.extend(trajectories)

    def sample(self, count: int, seed: int) -> list[Trajectory]:
        """Up to `count` trajectories; the same buffer and seed give the same ones."""
        return random.Random(seed).sample(list(self.trajectories), min(count, len(self.trajectories)))
