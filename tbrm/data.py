"""Trajectories and how they are packed: no padding, and what several of them begin with is computed once.

A packed batch is one row of tokens, cut into segments. A segment is a prompt followed by one or more responses to it::

    segment:    p p p p | a a a | b b | c c c c        every response sees the prompt and itself, never another response
    position:   0 1 2 3 | 4 5 6 | 4 5 | 4 5 6 7

The hidden state that predicts a response's first token is that of the last prompt token, so all responses of a segment
share the state s_1, and the last token of a response (which predicts nothing) is not fed at all.

What all prompts begin with (a system prompt, examples) is a segment of its own at the start of the row, the prefix. The
other segments see it and hold the rest.

Letters: N trajectories, T packed tokens, A actions (response tokens that the policy chose), P tokens of the prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

MAX_SHARED_SEGMENT = 1024
"""Tokens of a segment that shares anything, prefix included, at most. Its attention is one masked rectangle that also
computes the (masked) pairs across responses, so past this size a second copy of the prompt is cheaper."""


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
    weight_version: int | None = 0
    """Optimiser steps that the policy had taken when it made the response; None: somebody else made it."""
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
    """L tokens [start, stop) of a packed batch, which attend to each other and to the prefix, tokens [0, prefix)."""

    start: int
    stop: int
    prefix: int
    branches: tuple[int, ...]
    """The first token of each response, in order; the prompt is before them."""
    allowed: Tensor | None
    """[L, prefix + L] bool, whether query i may see key j; None where prefix is 0 and it is simply j <= i."""


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

    def scores_of(self, first: int, cu_seqlens: Tensor) -> Self:
        """The same batch, with the actions, rewards and scores of some trajectories alone: as many as `cu_seqlens` bounds,
        from `first` on."""
        trajectories = slice(first, first + len(cu_seqlens) - 1)
        start, stop = self.cu_seqlens[first], self.cu_seqlens[trajectories.stop]
        return replace(
            self,
            action_rows=self.action_rows[start:stop],
            targets=self.targets[start:stop],
            cu_seqlens=cu_seqlens,
            rewards=self.rewards[trajectories],
            ref_logprobs=self.ref_logprobs[start:stop],
            ref_values=self.ref_values[trajectories],
        )


def split_by_tokens(trajectories: Sequence[Trajectory], max_tokens: int) -> list[list[int]]:
    """Deals trajectories into micro-batches of at most `max_tokens` packed tokens; returns lists of indices.

    Trajectories with the same prompt go side by side so that they can share it. One that alone exceeds the budget gets
    a micro-batch of its own: no trajectory is ever cut.
    """
    first_seen: dict[tuple[int, ...], int] = {}
    for index, trajectory in enumerate(trajectories):
        first_seen.setdefault(tuple(trajectory.prompt_ids), index)
    order = sorted(range(len(trajectories)), key=lambda i: (first_seen[tuple(trajectories[i].prompt_ids)], i))

    prefix = common_prefix({tuple(t.prompt_ids) for t in trajectories if _may_share(t)})
    batches: list[list[int]] = []
    packer = _Packer(prefix)
    for index in order:
        if not batches or packer.tokens + packer.cost(trajectories[index]) > max_tokens:
            batches.append([])
            packer = _Packer(prefix)
        packer.add(trajectories[index])
        batches[-1].append(index)
    return batches


def deal(trajectories: Sequence[Trajectory], max_tokens: int, processes: int) -> list[list[list[int]]]:
    """The micro-batches of each process, of at most `max_tokens` each, as `split_by_tokens` makes them.

    The largest share is as small as shares of neighbours can make it. Every process gets the same number of micro-batches,
    since all must run the model together: where a share has fewer, the last ones are empty.
    """
    low, high = 0, max(1, sum(len(t.prompt_ids) + _fed_tokens(t) for t in trajectories))
    while processes > 1 and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(split_by_tokens(trajectories, middle)) <= processes else (middle, high)
    shares = split_by_tokens(trajectories, high)
    dealt = []
    for share in shares + [[] for _ in range(processes - len(shares))]:
        split = split_by_tokens([trajectories[i] for i in share], max_tokens)
        dealt.append([[share[i] for i in members] for members in split])
    count = max(map(len, dealt))
    return [batches + [[] for _ in range(count - len(batches))] for batches in dealt]


def pack(trajectories: Sequence[Trajectory], rewards: Tensor | None = None) -> TrajectoryBatch:
    """Packs trajectories in the order given. `rewards` [N] replaces their own (an objective may centre or scale them).

    Where there is no action to pack, the batch is one token that predicts nothing, so that the model can run all the same.
    """
    packer = _Packer(prefix=0)
    members_of: list[list[int]] = []
    for index, trajectory in enumerate(trajectories):
        if not trajectory.actions:
            continue
        if packer.add(trajectory):
            members_of[-1].append(index)
        else:
            members_of.append([index])

    leaders = [trajectories[members[0]] for members in members_of if _may_share(trajectories[members[0]])]
    prefix = common_prefix([t.prompt_ids for t in leaders]) if len(leaders) > 1 else 0
    input_ids = leaders[0].prompt_ids[:prefix] if prefix else []
    position_ids = list(range(prefix))
    segments = [Segment(0, prefix, 0, (), None)] if prefix else []
    rows: list[list[int]] = [[] for _ in trajectories]
    for members in members_of:
        start = len(input_ids)
        seen = prefix if _may_share(trajectories[members[0]]) else 0
        prompt = trajectories[members[0]].prompt_ids
        branch = [0] * (len(prompt) - seen)
        input_ids += prompt[seen:]
        position_ids += range(seen, len(prompt))
        last = len(input_ids) - 1
        branches = []
        for number, member in enumerate(members, start=1):
            trajectory = trajectories[member]
            fed = _fed_tokens(trajectory)
            first = len(input_ids)
            branches.append(first)
            rows[member] = [last if i == 0 else first + i - 1 for i in trajectory.actions]
            input_ids += trajectory.response_ids[:fed]
            position_ids += range(len(prompt), len(prompt) + fed)
            branch += [number] * fed
        alone = len(members) == 1 and seen == 0
        allowed = None if alone else _tree_mask(branch, position_ids[start:], seen)
        segments.append(Segment(start, len(input_ids), seen, tuple(branches), allowed))
    if not segments:
        input_ids, position_ids, segments = [0], [0], [Segment(0, 1, 0, (), None)]

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
    if trajectory.action_mask is None:
        return max(0, len(trajectory.response_ids) - 1)
    return max(trajectory.actions, default=0)


def _may_share(trajectory: Trajectory) -> bool:
    """Whether the trajectory's segment may have a prefix or several responses. False if it has no actions: no segment."""
    return bool(trajectory.actions) and len(trajectory.prompt_ids) + _fed_tokens(trajectory) <= MAX_SHARED_SEGMENT


def common_prefix(prompts: Collection[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, of which each keeps its last token to itself; 0 if there are no prompts."""
    if not prompts:
        return 0
    # What the first and the last in sorted order share, all share.
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    longest = min(map(len, prompts)) - 1
    return next((i for i in range(longest) if low[i] != high[i]), longest)


class _Packer:
    """Counts packed tokens and decides which trajectories share a segment, given a prefix of so many tokens."""

    def __init__(self, prefix: int) -> None:
        self.tokens = prefix
        self._prefix = prefix
        self._prompt: list[int] | None = None
        self._segment_tokens = 0

    def _shares(self, trajectory: Trajectory) -> bool:
        fits = self._segment_tokens + _fed_tokens(trajectory) <= MAX_SHARED_SEGMENT
        return fits and trajectory.prompt_ids == self._prompt

    def cost(self, trajectory: Trajectory) -> int:
        """Packed tokens that adding the trajectory takes."""
        if not trajectory.actions:
            return 0
        if self._shares(trajectory):
            return _fed_tokens(trajectory)
        seen = self._prefix if _may_share(trajectory) else 0
        return len(trajectory.prompt_ids) - seen + _fed_tokens(trajectory)

    def add(self, trajectory: Trajectory) -> bool:
        """Adds the trajectory; True if it joined the segment of the one before it."""
        shares, cost = self._shares(trajectory), self.cost(trajectory)
        self.tokens += cost
        if cost:
            full = _fed_tokens(trajectory) + (0 if shares else len(trajectory.prompt_ids))
            self._prompt = trajectory.prompt_ids
            self._segment_tokens = self._segment_tokens + full if shares else full
        return shares


def _tree_mask(branch: list[int], position: list[int], prefix: int) -> Tensor:
    """[L, prefix + L] bool: token i sees the prefix, and token j if that is not later and is in the prompt (branch 0) or in
    the same response."""
    b = torch.tensor(branch)
    p = torch.tensor(position)
    own = ((b[None, :] == 0) | (b[None, :] == b[:, None])) & (p[None, :] <= p[:, None])
    return torch.cat([torch.ones(len(branch), prefix, dtype=torch.bool), own], dim=1)
