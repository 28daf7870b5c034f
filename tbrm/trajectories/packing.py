"""How trajectories are packed: no padding, and what several of them begin with is computed once.

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

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from tbrm.trajectories.batch import TrajectoryBatch, moved
from tbrm.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SHARED_SEGMENT = 1024
"""Tokens of a segment that shares anything, prefix included, at most. Its attention is one masked rectangle that also
computes the (masked) pairs across responses, so past this size a second copy of the prompt is cheaper."""


class Run(NamedTuple):
    """Tokens [start, stop) of a packed batch, each of which sees all of `prefix` and `prompt`, and its run up to itself."""

    start: int
    stop: int
    prefix: range
    prompt: range

    @property
    def seen(self) -> int:
        """Tokens that all of the run see: the position of its first one."""
        return len(self.prefix) + len(self.prompt)


@dataclass(frozen=True)
class Segment:
    """L tokens [start, stop) of a packed batch, which attend to each other and to the prefix, tokens [0, prefix)."""

    start: int
    stop: int
    prefix: int
    branches: tuple[int, ...]
    """The first token of each response, in order; the prompt is before them."""

    def runs(self) -> list[Run]:
        """One response continues its prompt; where there are several, the prompt is a run of its own."""
        starts = self.branches if len(self.branches) > 1 else ()
        prompts = [range(0), *(range(self.start, starts[0]) for _ in starts)]
        bounds = pairwise([self.start, *starts, self.stop])
        return [
            Run(start, stop, range(self.prefix), prompt)
            for (start, stop), prompt in zip(bounds, prompts, strict=True)
            if start < stop
        ]


FORMS: dict[str, Callable[[Sequence[Segment], torch.device], Any]] = {}
"""What each attention that takes packed batches wants to be told of their segments, by its name: its module adds it here."""


@dataclass(frozen=True)
class PackedInputs:
    """One row of T tokens."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    segments: tuple[Segment, ...]
    action_rows: Tensor  # [A] int64: the packed token whose hidden state predicts the action

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **moved(self, device))

    def run(self, lm: PreTrainedModel, embedded: Tensor | None = None) -> Tensor:
        tokens = {"input_ids": self.input_ids[None]} if embedded is None else {"inputs_embeds": embedded[None]}
        segments = FORMS[lm.config._attn_implementation](self.segments, self.input_ids.device)
        backbone = lm.base_model(**tokens, position_ids=self.position_ids[None], segments=segments, use_cache=False)
        hidden: Tensor = backbone.last_hidden_state[0, self.action_rows]
        return hidden


@dataclass(frozen=True)
class PackedBatch(TrajectoryBatch):
    inputs: PackedInputs


class Load(NamedTuple):
    """What a trajectory adds to a packed batch. Its tokens are looked at once for it, and its place is weighed many times."""

    prompt: int
    """Index of the first trajectory with the same prompt."""
    prompt_tokens: int
    fed: int
    """Response tokens that the model must read: those before the last action."""
    acts: bool
    """Whether there is an action; without one, nothing is packed."""

    @property
    def may_share(self) -> bool:
        """Whether the trajectory's segment may have a prefix or several responses."""
        return self.acts and self.prompt_tokens + self.fed <= MAX_SHARED_SEGMENT


def loads_of(trajectories: Sequence[Trajectory]) -> list[Load]:
    first_seen: dict[tuple[int, ...], int] = {}
    return [
        Load(first_seen.setdefault(tuple(t.prompt_ids), index), len(t.prompt_ids), _fed_tokens(t), t.acts)
        for index, t in enumerate(trajectories)
    ]


def pack(trajectories: Sequence[Trajectory]) -> PackedBatch:
    """Packs trajectories in the order given.

    Where there is no action to pack, the batch is one token that predicts nothing, so that the model can run all the same.
    """
    loads = loads_of(trajectories)
    packer = Packer(prefix=0)
    members_of: list[list[int]] = []
    for index, load in enumerate(loads):
        if not load.acts:
            continue
        if packer.add(load):
            members_of[-1].append(index)
        else:
            members_of.append([index])

    leaders = [trajectories[members[0]].prompt_ids for members in members_of if loads[members[0]].may_share]
    prefix = common_prefix(leaders) if len(leaders) > 1 else 0
    input_ids = leaders[0][:prefix] if prefix else []
    position_ids = list(range(prefix))
    segments = [Segment(0, prefix, 0, ())] if prefix else []
    actions = [trajectory.actions for trajectory in trajectories]
    rows: list[list[int]] = [[] for _ in trajectories]
    for members in members_of:
        start = len(input_ids)
        seen = prefix if loads[members[0]].may_share else 0
        prompt = trajectories[members[0]].prompt_ids
        input_ids += prompt[seen:]
        position_ids += range(seen, len(prompt))
        last = len(input_ids) - 1
        branches = []
        for member in members:
            fed = loads[member].fed
            first = len(input_ids)
            branches.append(first)
            rows[member] = [last if i == 0 else first + i - 1 for i in actions[member]]
            input_ids += trajectories[member].response_ids[:fed]
            position_ids += range(len(prompt), len(prompt) + fed)
        segments.append(Segment(start, len(input_ids), seen, tuple(branches)))
    if not segments:
        input_ids, position_ids, segments = [0], [0], [Segment(0, 1, 0, ())]

    bounds = tuple(accumulate(map(len, rows), initial=0))
    inputs = PackedInputs(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        position_ids=torch.tensor(position_ids, dtype=torch.int64),
        segments=tuple(segments),
        action_rows=torch.tensor([row for r in rows for row in r], dtype=torch.int64),
    )
    return PackedBatch(
        inputs,
        targets=torch.tensor(
            [t.response_ids[i] for t, chosen in zip(trajectories, actions, strict=True) for i in chosen],
            dtype=torch.int64,
        ),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        bounds=bounds,
    )


def _fed_tokens(trajectory: Trajectory) -> int:
    """Response tokens that the model must read: those before the last action."""
    if trajectory.action_mask is None:
        return max(0, len(trajectory.response_ids) - 1)
    return max(trajectory.actions, default=0)


def common_prefix(prompts: Collection[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, of which each keeps its last token to itself; 0 if there are no prompts."""
    if not prompts:
        return 0
    # What the first and the last in sorted order share, all share.
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    longest = min(map(len, prompts)) - 1
    return next((i for i in range(longest) if low[i] != high[i]), longest)


class Packer:
    """Counts packed tokens and decides which trajectories share a segment, given a prefix of so many tokens."""

    def __init__(self, prefix: int) -> None:
        self.tokens = prefix
        self._prefix = prefix
        self._prompt: int | None = None
        self._segment_tokens = 0

    def _shares(self, load: Load) -> bool:
        return load.prompt == self._prompt and self._segment_tokens + load.fed <= MAX_SHARED_SEGMENT

    def cost(self, load: Load) -> int:
        """Packed tokens that adding the trajectory takes."""
        if not load.acts:
            return 0
        if self._shares(load):
            return load.fed
        return load.prompt_tokens - (self._prefix if load.may_share else 0) + load.fed

    def add(self, load: Load) -> bool:
        """Adds the trajectory; True if it joined the segment of the one before it."""
        shares, cost = self._shares(load), self.cost(load)
        self.tokens += cost
        if cost:
            full = load.fed + (0 if shares else load.prompt_tokens)
            self._prompt = load.prompt
            self._segment_tokens = self._segment_tokens + full if shares else full
        return shares
