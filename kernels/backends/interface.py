"""What passes between the public functions and a backend.

T tokens, V vocabulary entries, D hidden width. A backend is a module that satisfies `Backend`: two functions for
`linear_token_stats`, which recomputes the logits in its backward pass, and a `Head` for the single pass, which keeps those
of one chunk of tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .head_memory import HeadMemory


@dataclass(frozen=True)
class TokenStatsOptions:
    """How hidden states become Q-values, and what is asked of them.

    Q = cap(logit_scale * (hidden @ weight.T + bias)) / temperature, where cap(x) = softcap * tanh(x / softcap).
    """

    operand_dtype: torch.dtype
    """The dtype to which hidden and weight are rounded before they are multiplied; products are never rounded to it."""
    temperature: float | Tensor = 1.0
    """A tensor is [T], one for each of the tokens at hand, contiguous and in the compute dtype."""
    softcap: float | None = None
    logit_scale: float = 1.0
    entropy: bool = False
    ignore_index: int = -100

    def __post_init__(self) -> None:
        for name in ("temperature", "softcap", "logit_scale"):
            value = getattr(self, name)
            if isinstance(value, Tensor) or (name == "softcap" and value is None):
                continue
            if not (math.isfinite(value) and value > 0):
                hint = " (None for no soft-capping)" if name == "softcap" else ""
                raise ValueError(f"{name} is {value!r}: it must be a finite number above 0{hint}")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of every statistic and of every accumulator."""
        return torch.float64 if self.operand_dtype == torch.float64 else torch.float32

    @property
    def factor(self) -> float | Tensor:
        """dQ / dlogits, but for the slope of the soft-capping."""
        return self.logit_scale / self.temperature

    def rows(self, select: Callable[[Tensor], Tensor]) -> TokenStatsOptions:
        """Those of some of the tokens, which `select` takes from [T]."""
        if isinstance(self.temperature, Tensor):
            return replace(self, temperature=select(self.temperature))
        return self

    def of(self, tokens: slice) -> TokenStatsOptions:
        return self.rows(lambda values: values[tokens])


class RowStats(NamedTuple):
    """What the backward pass needs of each softmax: [T] each, in the compute dtype, 0 where the target is ignored.

    The log-sum-exp is `max + log_sum`. It is kept in two parts because a sum rounded at logits of 1e4 would cost the
    backward pass three digits of every probability.
    """

    max: Tensor  # max_v Q_v, or another number that is within 60 of the log-sum-exp
    log_sum: Tensor  # log sum_v exp(Q_v - max)
    entropy: Tensor | None

    @property
    def lse(self) -> Tensor:
        return self.max + self.log_sum


class RowGrads(NamedTuple):
    """The loss's derivatives with respect to the three statistics, each [T] in the compute dtype."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor | None

    def of(self, tokens: slice) -> RowGrads:
        return RowGrads(self.logprobs[tokens], self.lse[tokens], None if self.entropy is None else self.entropy[tokens])


class Needs(NamedTuple):
    """Which gradients the backward pass has to compute; the others are neither computed nor allocated."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGrads:
    """The gradients that the single pass sums over chunks; None for those that nobody needs."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, options: TokenStatsOptions, needs: Needs, *, scaled_later: bool = False
    ) -> None:
        """scaled_later: a factor of the loss is still to come, so that `held_dtype` holds."""
        self._dtype = options.compute_dtype
        self._held = held_dtype if scaled_later else lambda dtype: dtype
        self.hidden = torch.empty_like(hidden, dtype=self._held(hidden.dtype)) if needs.hidden else None
        """[T, D], in the dtype of hidden: each chunk writes its own tokens."""
        self.weight = None
        if needs.weight:
            as_held = self._held(weight.dtype)
            self.weight = torch.empty_like(weight, dtype=as_held, memory_format=torch.contiguous_format)
        """[V, D], in the dtype of weight: what is handed out in the end. The chunks are summed in `accumulator`, or in the
        halves that `low_halves` describes."""
        self.bias = weight.new_zeros(weight.shape[0], dtype=self._dtype) if needs.bias else None
        """[V], in the compute dtype."""
        self.fresh = True
        """Nothing was added to the weight's gradient yet: the first chunk writes instead of adding."""
        self._accumulator: Tensor | None = None
        self._low_halves: Tensor | None = None

    @property
    def accumulator(self) -> Tensor | None:
        """[V, D] in the compute dtype, uninitialised while `fresh`; made when first asked for. None if nobody needs it."""
        if self.weight is None or self.weight.dtype == self._dtype:
            return self.weight
        if self._accumulator is None:
            self._accumulator = torch.empty_like(self.weight, dtype=self._dtype)
        return self._accumulator

    @property
    def low_halves(self) -> Tensor:
        """[V, D] int16, uninitialised while `fresh`; made when first asked for: half the memory of an accumulator.

        The lower 16 bits of a float32 sum, for a 16-bit weight. The upper ones are kept in the memory of `weight`, which
        such a backend leaves rounded after the last chunk.
        """
        assert self.weight is not None and self.weight.element_size() == 2
        if self._low_halves is None:
            self._low_halves = torch.empty_like(self.weight, dtype=torch.int16)
        return self._low_halves

    def finish(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, weight and bias, each in its tensor's dtype."""
        if self.weight is not None and self.fresh:
            self.weight.zero_()
        elif self.weight is not None and self._accumulator is not None:
            self.weight.copy_(self._accumulator)
        return self.hidden, self.weight, self._bias_of(bias)

    def _bias_of(self, bias: Tensor | None) -> Tensor | None:
        return None if self.bias is None or bias is None else self.bias.to(self._held(bias.dtype))


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient that is yet to be scaled: float16 would underflow where the loss's scale is what keeps it from that."""
    return torch.float32 if dtype == torch.float16 else dtype


class Chunk(Protocol):
    """Some tokens and their logits, in memory until the head is asked for the next chunk."""

    logprobs: Tensor  # [tokens]
    stats: RowStats

    def backward(self, grads: RowGrads, into: HeadGrads, tokens: slice, *, last: bool) -> None:
        """Adds the chunk's part to `into`; hidden's gradient goes to its rows `tokens`. May be called once.

        After the `last` chunk nothing more is added: it may round the weight's gradient on the way.
        """
        ...


class Head(Protocol):
    """A head that is ready to multiply."""

    weight: Tensor  # [V, D]
    memory: HeadMemory

    def chunk(self, hidden: Tensor, targets: Tensor, options: TokenStatsOptions) -> Chunk:
        """The statistics of at least one token, and what the backward pass needs in order to recompute nothing.

        `options` are those of the tokens: the head's own but for their temperatures.
        """
        ...


class Backend(Protocol):
    """Its functions are called with autograd and autocast off, and with inputs that are checked."""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if the backend can multiply operands of the dtype on the device, else the reason why it cannot."""
        ...

    def token_stats_forward(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: TokenStatsOptions
    ) -> tuple[Tensor, RowStats]:
        """The log-probs of the targets [T], and the rest. Holds no tensor of T x V elements."""
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

    def Head(self, weight: Tensor, bias: Tensor | None, options: TokenStatsOptions) -> Head: ...
