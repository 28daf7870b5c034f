"""Trajectories and how they are packed: no padding, and a prompt that several responses share is computed once.

A packed batch is one row of tokens, cut into segments. A segment is a prompt followed by one or more responses to it::

    segment:    p p p p | a a a | b b | c c c c        every response sees the prompt and itself, never another response
    position:   0 1 2 3 | 4 5 6 | 4 5 | 4 5 6 7

The hidden state that predicts a response's first token is that of the last prompt token, so all responses of a segment
share the state s_1, and the last token of a response (which predicts nothing) is not fed at all.

Letters: N trajectories, T packed tokens, A actions (response tokens that the policy chose).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

MAX_SHARED_SEGMENT = 1024
"""Tokens of a segment with several responses, at most. Its attention is one masked square that also computes the
(masked) pairs across responses, so past this size a second copy of the prompt is cheaper."""


@dataclass(frozen=True)
class ReferenceScore:
    """What the reference model says of one trajectory, on the CPU."""

    version: int
    """The reference's version when it said so; a score of another version is not used."""
    logprobs: Tensor
    """log pi_ref of each action, [H] float32."""
    value: Tensor
    """V_ref(s_1), [] float32."""


@dataclass
class Trajectory:
    """A prompt, a response to it as token ids, and the reward."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float
    truncated: bool = False
    """The response was cut off: its last token is not an end of sequence."""
    group: int = 0
    """Trajectories of one group answer the same problem; group means are taken over them."""
    weight_version: int = 0
    """Optimiser steps that the policy had taken when it made the response."""
    action_mask: list[bool] | None = None
    """Which response tokens the policy chose; None for all. Tool and user turns are False: context, never scored."""
    reference: ReferenceScore | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(
                "Trajectory.prompt_ids is empty: the first state s_1 needs at least one token (a BOS will do)"
            )
        if self.action_mask is not None and len(self.action_mask) != len(self.response_ids):
            raise ValueError(
                f"Trajectory.action_mask has {len(self.action_mask)} entries for {len(self.response_ids)} response tokens"
            )

    @property
    def actions(self) -> list[int]:
        """Indices into the response of the tokens that the policy chose."""
        if self.action_mask is None:
            return list(range(len(self.response_ids)))
        return [i for i, chosen in enumerate(self.action_mask) if chosen]


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a packed batch that may attend to each other, and how."""

    start: int
    stop: int
    allowed: Tensor | None
    """[L, L] bool, whether query i may see key j; None where that is simply j <= i."""


@dataclass(frozen=True)
class TrajectoryBatch:
    """Packed trajectories, ready for the model. Move it with `to`."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    segments: tuple[Segment, ...]
    action_rows: Tensor  # [A] int64: the packed token whose hidden state predicts the action
    targets: Tensor  # [A] int64: the action
    cu_seqlens: Tensor  # [N+1] int32: trajectory i owns actions cu_seqlens[i]:cu_seqlens[i+1]
    rewards: Tensor  # [N] float32

    def to(self, device: torch.device | str) -> Self:
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        moved["segments"] = tuple(
            replace(s, allowed=None if s.allowed is None else s.allowed.to(device, non_blocking=True))
            for s in self.segments
        )
        return replace(self, **moved)


@dataclass(frozen=True)
class ScoredBatch(TrajectoryBatch):
    """A packed batch with what the reference model says of it."""

    ref_logprobs: Tensor  # [A] float32
    ref_values: Tensor  # [N] float32: V_ref(s_1), 0 for a trajectory without actions


def split_by_tokens(trajectories: Sequence[Trajectory], max_tokens: int) -> list[list[int]]:
    """Deals trajectories into micro-batches of at most `max_tokens` packed tokens; returns lists of indices.

    Trajectories with the same prompt go side by side so that they can share it. One that alone exceeds the budget gets
    a micro-batch of its own: no trajectory is ever cut.
    """
    first_seen: dict[tuple[int, ...], int] = {}
    for index, trajectory in enumerate(trajectories):
        first_seen.setdefault(tuple(trajectory.prompt_ids), index)
    order = sorted(range(len(trajectories)), key=lambda i: (first_seen[tuple(trajectories[i].prompt_ids)], i))

    batches: list[list[int]] = []
    packer = _Packer()
    for index in order:
        if not batches or packer.tokens + packer.cost(trajectories[index]) > max_tokens:
            batches.append([])
            packer = _Packer()
        packer.add(trajectories[index])
        batches[-1].append(index)
    return batches


def pack(trajectories: Sequence[Trajectory], rewards: Tensor | None = None) -> TrajectoryBatch:
    """Packs trajectories in the order given. `rewards` [N] replaces their own (an objective may centre or scale them)."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    segments: list[Segment] = []
    rows: list[list[int]] = [[] for _ in trajectories]
    packer = _Packer()
    members_of: list[list[int]] = []
    for index, trajectory in enumerate(trajectories):
        if not trajectory.actions:
            continue
        if packer.add(trajectory):
            members_of[-1].append(index)
        else:
            members_of.append([index])
    for members in members_of:
        start = len(input_ids)
        prompt = trajectories[members[0]].prompt_ids
        branch = [0] * len(prompt)
        input_ids += prompt
        position_ids += range(len(prompt))
        for number, member in enumerate(members, start=1):
            trajectory = trajectories[member]
            fed = _fed_tokens(trajectory)
            first = len(input_ids)
            rows[member] = [start + len(prompt) - 1 if i == 0 else first + i - 1 for i in trajectory.actions]
            input_ids += trajectory.response_ids[:fed]
            position_ids += range(len(prompt), len(prompt) + fed)
            branch += [number] * fed
        allowed = None if len(members) == 1 else _tree_mask(branch, position_ids[start:])
        segments.append(Segment(start, len(input_ids), allowed))

    targets = [t.response_ids[i] for t in trajectories for i in t.actions]
    lengths = torch.tensor([0, *(len(r) for r in rows)], dtype=torch.int32)
    return TrajectoryBatch(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        position_ids=torch.tensor(position_ids, dtype=torch.int64),
        segments=tuple(segments),
        action_rows=torch.tensor([row for r in rows for row in r], dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        cu_seqlens=lengths.cumsum(0, dtype=torch.int32),
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float32) if rewards is None else rewards,
    )


def _fed_tokens(trajectory: Trajectory) -> int:
    """Response tokens that the model must read: those before the last action."""
    actions = trajectory.actions
    return actions[-1] if actions else 0


class _Packer:
    """Counts packed tokens and decides which trajectories share a segment."""

    def __init__(self) -> None:
        self.tokens = 0
        self._prompt: list[int] | None = None
        self._segment_tokens = 0

    def _shares(self, trajectory: Trajectory) -> bool:
        fits = self._segment_tokens + _fed_tokens(trajectory) <= MAX_SHARED_SEGMENT
        return fits and trajectory.prompt_ids == self._prompt

    def cost(self, trajectory: Trajectory) -> int:
        """Packed tokens that adding the trajectory takes."""
        if not trajectory.actions:
            return 0
        return _fed_tokens(trajectory) + (0 if self._shares(trajectory) else len(trajectory.prompt_ids))

    def add(self, trajectory: Trajectory) -> bool:
        """Adds the trajectory; True if it joined the segment of the one before it."""
        shares, cost = self._shares(trajectory), self.cost(trajectory)
        self.tokens += cost
        if cost:
            self._prompt = trajectory.prompt_ids
            self._segment_tokens = self._segment_tokens + cost if shares else cost
        return shares


def _tree_mask(branch: list[int], position: list[int]) -> Tensor:
    """[L, L] bool: token i sees token j if j is not later and is in the prompt (branch 0) or in the same response."""
    b = torch.tensor(branch)
    p = torch.tensor(position)
    return ((b[None, :] == 0) | (b[None, :] == b[:, None])) & (p[None, :] <= p[:, None])
