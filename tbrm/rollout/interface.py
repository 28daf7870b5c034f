"""The interface of rollout engines: token ids in, token ids out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tbrm.reporting.progress import Watch, unwatched


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. There is no truncation (top-k, top-p): it would bias the log-probs that training compares."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""


@dataclass(frozen=True)
class Request:
    """A prompt to be answered. What is sampled depends on the request alone: not on those beside it, nor on who answers."""

    prompt: list[int]
    samples: int = 1
    """Responses wanted."""
    seed: int = 0
    """Of its random numbers; equal ones give equal prompts equal responses."""


@dataclass(frozen=True)
class Response:
    """What an engine answers."""

    token_ids: list[int]
    """As sampled, with the one that ends it (`tbrm.policy.ends`), unless truncated."""
    truncated: bool
    weight_version: int = 0
    """The `version` of the weights that made it."""
    logprobs: list[float] | None = None
    """Of each token, in the distribution it was drawn from, as the engine computed it; None if greedy, or if it says none."""


class RolloutEngine(Protocol):
    """What generates: any object with these three methods."""

    def update_weights(self, version: int) -> dict[str, float]:
        """From now on responses come from the policy's weights as they are at this moment, known as `version`: the optimiser
        steps that led to them. Does nothing if the engine has that version. Returns metrics of the transfer, if it has any."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, watch: Watch = unwatched
    ) -> list[list[Response]]:
        """The responses to each request; `watch` is told as they come. The same weights, request and sampling give the same
        responses, whatever else is asked beside it, in whatever order and number at once."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds outside of this process's memory. It answers no more after that."""
        ...


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose ("rollout", run seed, step, ...), so that no random state needs carrying over a restart."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def make_requests(prompts: Sequence[list[int]], samples: int, *purpose: int | str) -> list[Request]:
    """`samples` responses to each prompt, the n-th of which has the n-th seed of the `purpose`."""
    return [Request(prompt, samples, derive_seed(*purpose, number)) for number, prompt in enumerate(prompts)]
