"""An engine on weights of its own, which may generate while the policy is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tbrm.policy.model import PolicyModel
from tbrm.policy.sharded import frozen_copy
from tbrm.reporting.progress import Watch, unwatched
from tbrm.rollout.interface import Request, Response, RolloutEngine, Sampling


class EngineClosed(RuntimeError):
    """A generation that was given up because the run has ended."""


class FrozenEngine:
    """The engine that `make` makes, on a copy of the policy that changes in `update_weights` alone."""

    def __init__(self, policy: PolicyModel, make: Callable[[PolicyModel], RolloutEngine]) -> None:
        self._policy = policy
        self._copy = frozen_copy(policy)
        self._engine = make(self._copy)
        self._version: int | None = None
        self._closed = False
        self._copy.lm.base_model.register_forward_pre_hook(self._stop_if_closed)

    def update_weights(self, version: int) -> dict[str, float]:
        """Reads the policy: nobody may write to it meanwhile."""
        if version != self._version:
            self._copy.load_state_dict(self._policy.state_dict())
            self._version = version
        return self._engine.update_weights(version)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, watch: Watch = unwatched
    ) -> list[list[Response]]:
        return self._engine.generate(requests, sampling, watch)

    def close(self) -> None:
        """Ends a generation of another thread too, at its next token."""
        self._closed = True
        self._engine.close()

    def _stop_if_closed(self, *_: object) -> None:
        if self._closed:
            raise EngineClosed("the engine was closed while it generated")
