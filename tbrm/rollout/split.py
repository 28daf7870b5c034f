"""Generation divided over the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence

from tbrm.parallel import World
from tbrm.reporting.progress import Watch, unwatched
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

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, watch: Watch = unwatched
    ) -> list[list[Response]]:
        # Also without a request: the embedded engine's weights are gathered by all together.
        mine = self.world.share(requests)

        def all_alike(count: int) -> None:  # the others are about as far as this process
            watch(count * self.world.size)

        parts = self.world.everywhere(lambda: self.engine.generate(mine, sampling, all_alike))
        return [responses for part in parts for responses in part]
