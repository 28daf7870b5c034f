"""Generation divided over the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tbrm.parallel import World
from tbrm.rollout.base import Response, RolloutEngine, Sampling, derive_seed


class SplitEngine:
    """Every process answers its share of the prompts with an engine of its own, and gets the answers to all of them."""

    def __init__(self, engine: RolloutEngine, world: World) -> None:
        self.engine = engine
        self.world = world
        self.eos_ids = engine.eos_ids

    def update_weights(self, version: int) -> dict[str, float]:
        return self.engine.update_weights(version)

    def close(self) -> None:
        self.engine.close()

    def generate(self, prompts: Sequence[list[int]], samples: int, sampling: Sampling) -> list[list[Response]]:
        if self.world.rank > 0:  # else the n-th prompt of every share would draw the same random numbers
            sampling = replace(sampling, seed=derive_seed(sampling.seed, "process", self.world.rank))
        return self.world.split(lambda mine: self.engine.generate(mine, samples, sampling), prompts)
