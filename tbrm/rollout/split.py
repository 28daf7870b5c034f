"""Generation divided over the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence

from tbrm.parallel import World
from tbrm.rollout.interface import Request, Response, RolloutEngine, Sampling


class SplitEngine:
    """Every process answers its share of the requests with an engine of its own, and gets the answers to all of them."""

    def __init__(self, engine: RolloutEngine, world: World) -> None:
        self.engine = engine
        self.world = world

    def update_weights(self, version: int) -> dict[str, float]:
        return self.engine.update_weights(version)

    def close(self) -> None:
        self.engine.close()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Response]]:
        # Also without a request: the embedded engine's weights are gathered by all together.
        mine = self.world.share(requests)
        parts = self.world.everywhere(lambda: self.engine.generate(mine, sampling))
        return [responses for part in parts for responses in part]
