"""What passes between `linear_token_stats` and a backend.

T tokens, V vocabulary entries, D hidden width. A backend is a module that satisfies `Backend`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStatsOptions:
    """How hidden states become Q-values, and what is asked of them.

    Q = cap(logit_scale * (hidden @ weight.T + bias)) / temperature, where cap(x) = softcap * tanh(x / softcap).
    """

    operand_dtype: torch.dtype
    """The dtype to which hidden and weight are rounded before they are multiplied; products are never rounded to it."""
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    entropy: bool = False
    ignore_index: int = -100

    def __post_init__(self) -> None:
        for name in ("temperature", "softcap", "logit_scale"):
            value = getattr(self, name)
            if name == "softcap" and value is None:
                continue
            if not (math.isfinite(value) and value > 0):
                hint = " (None for no soft-capping)" if name == "softcap" else ""
                raise ValueError(f"{name} is {value!r}: it must be a finite number above 0{hint}")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of every statistic and of every accumulator."""
        return torch.float64 if self.operand_dtype == torch.float64 else torch.float32


class RowStats(NamedTuple):
    """What the backward pass needs of each softmax: [T] each, in the compute dtype, 0 where the target is ignored.

    The log-sum-exp is `max + log_sum`. It is kept in two parts because a sum rounded at logits of 1e4 would cost the
    backward pass three digits of every probability.
    """

    max: Tensor  # max_v Q_v
    log_sum: Tensor  # log sum_v exp(Q_v - max)
    entropy: Tensor | None


class RowGrads(NamedTuple):
    """The loss's derivatives with respect to the three statistics, each [T] in the compute dtype."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor | None


class Needs(NamedTuple):
    """Which gradients the backward pass has to compute; the others are neither computed nor allocated."""

    hidden: bool
    weight: bool
    bias: bool


class Backend(Protocol):
    """Its functions are called with autograd and autocast off."""

    def why_not(self, device: torch.device) -> str | None:
        """None if the backend can run on the device, else the reason why it cannot."""
        ...

    def token_stats_forward(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: TokenStatsOptions
    ) -> tuple[Tensor, RowStats]:
        """The log-probs of the targets [T], and the rest, of checked inputs. Holds no tensor of T x V elements."""
        ...

    def token_stats_backward(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: TokenStatsOptions,
        stats: RowStats,
        grads: RowGrads,
        needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, weight and bias, each rounded once, to its tensor's dtype; None if not needed."""
        ...
