"""The interface of rollout engines: token ids in, token ids out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. There is no truncation (top-k, top-p): it would bias the log-probs that training compares."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    seed: int = 0


@dataclass(frozen=True)
class Response:
    token_ids: list[int]
    """The end-of-sequence token included, unless truncated."""
    truncated: bool
    weight_version: int = 0
    """The `version` of the weights that made it."""
    logprobs: list[float] | None = None
    """Of each token, at the sampling temperature, as the engine computed it; None if greedy, or if it does not say."""


class RolloutEngine(Protocol):
    eos_ids: list[int]
    """Every id that ends a response."""

    def update_weights(self, version: int) -> dict[str, float]:
        """From now on responses come from the policy's weights as they are at this moment, known as `version`: the optimiser
        steps that led to them. Does nothing if the engine has that version. Returns metrics of the transfer, if it has any."""
        ...

    def generate(self, prompts: Sequence[list[int]], samples: int, sampling: Sampling) -> list[list[Response]]:
        """`samples` responses to each prompt. The same weights and arguments give the same responses."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds outside of this process's memory. It answers no more after that."""
        ...


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose ("rollout", run seed, step, ...), so that no random state needs carrying over a restart."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
