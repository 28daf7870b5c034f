"""What engines have in common that generate with the policy itself: there are no weights to send anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from tbrm.chat import Chat
from tbrm.policy.model import PolicyModel
from tbrm.rollout.interface import Response


class InProcessEngine:
    """Writes up to `batch_size` responses at once."""

    def __init__(self, policy: PolicyModel, chat: Chat, batch_size: int) -> None:
        self.policy = policy
        self.batch_size = batch_size
        self.ends = chat.ends
        self._barred = chat.barred
        self._version = 0

    def update_weights(self, version: int) -> dict[str, float]:
        self._version = version  # the weights are the policy's own
        return {}

    def close(self) -> None:
        pass

    def _response(self, ids: list[int], logprobs: list[float] | None) -> Response:
        end = self.ends.length(ids)
        return Response(ids[:end], end is None, self._version, logprobs and logprobs[:end])


def noise(seed: int, count: int) -> Tensor:
    """The random numbers of a response, [count] float64: its own, whichever others are written beside it."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def broken_logits(precision: torch.dtype) -> FloatingPointError:
    return FloatingPointError(
        "rollout: the model's logits are NaN or infinite, and nothing can be drawn from them: its weights are broken, "
        f"or its products overflow in {precision} (model.precision)"
    )
