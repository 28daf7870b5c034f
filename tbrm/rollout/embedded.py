"""The embedded engine: generates with the policy itself, so there are no weights to send anywhere.

Continuous batching: a response that is finished leaves at once, and one that waits takes its place. Each pass of the model
reads the next token of every response and, beside them, the prompts of those that enter. What all prompts begin with is
read once, and each prompt once for the responses to it that are written at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tbrm.policy.ends import Ends
from tbrm.policy.generation import generation_mode, logits_of
from tbrm.policy.model import PolicyModel
from tbrm.reporting.progress import Watch, unwatched
from tbrm.rollout.choose import draw, most_likely
from tbrm.rollout.in_process import InProcessEngine, broken_logits, noise
from tbrm.rollout.interface import Request, Response, Sampling, derive_seed
from tbrm.rollout.kv_cache import CACHED_ATTENTION, KeyValueCache, Prompts, Reading
from tbrm.rollout.packed_weights import packed_weights
from tbrm.trajectories.packing import common_prefix

PROMPT_TOKENS = 4096
"""Of prompts that are read in one pass, at most, unless a single one is longer."""
TOKENS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}
"""Tokens written before the host learns which responses have ended: on a GPU it must wait for that."""


class EmbeddedEngine(InProcessEngine):
    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, watch: Watch = unwatched
    ) -> list[list[Response]]:
        responses: list[dict[int, Response]] = [{} for _ in requests]
        # Prompts of one length enter together, equal ones side by side.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), requests[i].prompt))
        waiting = deque(
            _Row(tuple(requests[i].prompt), i, sample, derive_seed(requests[i].seed, sample))
            for i in order
            for sample in range(requests[i].samples)
        )
        with (
            generation_mode(self.policy, CACHED_ATTENTION) as lm,
            packed_weights(lm, self.policy.precision),
        ):
            batch = _Batch(self.policy, lm, min(self.batch_size, len(waiting)), self.ends, self._barred, sampling)
            if waiting:
                prompts = [request.prompt for request in requests]
                batch.read_prefix(prompts[0][: common_prefix(prompts)])
            while waiting or batch.rows:
                for row, ids, logprobs in (finished := batch.advance(waiting)):
                    responses[row.request][row.sample] = self._response(ids, logprobs)
                watch(len(finished))
        return [[answers[sample] for sample in sorted(answers)] for answers in responses]


@dataclass
class _Row:
    """A response that waits or is being written."""

    prompt: tuple[int, ...]
    request: int
    sample: int
    seed: int
    written: int = 0


class _Batch:
    """The responses that are being written: `rows[i]` has row i of the cache and of every tensor.

    Of a row that enters, all of the prompt but its last token is read; the last one is the first of the tokens that rows
    read one by one, and what comes of it is the response's first token.
    """

    def __init__(
        self,
        policy: PolicyModel,
        lm: PreTrainedModel,
        capacity: int,
        ends: Ends,
        barred: Sequence[int],
        sampling: Sampling,
    ) -> None:
        self.rows: list[_Row] = []
        self._policy = policy
        self._lm = lm
        self._capacity = capacity
        self._sampling = sampling
        self._device = policy.device
        self._cache = KeyValueCache(capacity)
        self._prefix = 0
        self._ends = ends
        self._end_ids = torch.tensor(ends.ids, device=self._device)
        self._barred = torch.tensor(barred, dtype=torch.int64, device=self._device)

        self._token = torch.zeros(capacity, dtype=torch.int64, device=self._device)  # the one to be read next
        self._position = torch.zeros_like(self._token)  # where it stands
        self._written = torch.zeros_like(self._token)  # tokens of the response so far
        self._ended = torch.zeros_like(self._token, dtype=torch.bool)
        self._broken = torch.zeros((), dtype=torch.bool, device=self._device)  # whether logits were NaN
        self._ids = self._token.new_zeros(capacity, sampling.max_new_tokens)
        self._logprobs = torch.zeros_like(self._ids, dtype=torch.float32)
        self._uniforms = torch.zeros_like(self._ids, dtype=torch.float64)
        self._of_rows = (
            self._token, self._position, self._written, self._ended, self._ids, self._logprobs, self._uniforms
        )  # fmt: skip

    def read_prefix(self, ids: list[int]) -> None:
        """Reads what all prompts begin with, for all rows that will ever be."""
        if ids:
            self._read(ids, [Prompts(first=0, count=1, start=0, length=len(ids))])
            self._cache.copy([0], list(range(1, self._capacity)), len(ids))
            self._prefix = len(ids)

    def advance(self, waiting: deque[_Row]) -> list[tuple[_Row, list[int], list[float] | None]]:
        """Writes a token of every row, or a few, and lets waiting rows enter where there is room. Returns the rows that are
        finished, each with its tokens (on a GPU a few beyond the end) and their log-probs, unless greedy."""
        if waiting and len(self.rows) < self._capacity:
            self._let_in(waiting)
        else:
            left = min(self._sampling.max_new_tokens - row.written for row in self.rows)
            for _ in range(min(left, TOKENS_BETWEEN_LOOKS.get(self._device.type, 1))):
                self._read()
        return self._let_go()

    def _let_in(self, waiting: deque[_Row]) -> None:
        holder = {row.prompt: i for i, row in enumerate(self.rows)}  # a row that has the prompt
        first = len(self.rows)
        readers: list[_Row] = []
        followers: list[_Row] = []
        tokens: list[int] = []
        while waiting and first + len(readers) + len(followers) < self._capacity:
            unread = () if waiting[0].prompt in holder else waiting[0].prompt[self._prefix : -1]
            if tokens and len(tokens) + len(unread) > PROMPT_TOKENS:
                break
            row = waiting.popleft()
            if row.prompt in holder:
                followers.append(row)
            else:
                holder[row.prompt] = first + len(readers)
                readers.append(row)
                tokens += unread

        prompts = []
        at = first
        for length, alike in groupby(len(row.prompt) - 1 - self._prefix for row in readers):
            prompts.append(Prompts(at, len(list(alike)), self._prefix, length))
            at += prompts[-1].count
        self._read(tokens, [group for group in prompts if group.length])
        if followers:
            targets = list(range(at, at + len(followers)))
            longest = max(len(row.prompt) for row in followers) - 1
            self._cache.copy([holder[row.prompt] for row in followers], targets, longest)
        self._start(readers + followers)

    def _start(self, rows: list[_Row]) -> None:
        """Makes rows whose prompts are read part of the batch."""
        new = slice(len(self.rows), len(self.rows) + len(rows))
        self.rows += rows
        self._token[new] = torch.tensor([row.prompt[-1] for row in rows], device=self._device)
        self._position[new] = torch.tensor([len(row.prompt) - 1 for row in rows], device=self._device)
        self._written[new] = 0
        self._ended[new] = False
        if self._sampling.temperature > 0:
            self._uniforms[new] = torch.stack([noise(row.seed, self._sampling.max_new_tokens) for row in rows]).to(
                self._device
            )

    def _read(self, prompt_ids: Sequence[int] = (), prompts: Sequence[Prompts] = ()) -> None:
        """One pass of the model: writes the next token of all rows, and reads prompts for rows after them."""
        count = len(self.rows)
        ids, positions = self._token[:count], self._position[:count]
        span = max((len(row.prompt) + row.written for row in self.rows), default=0)
        self._cache.reserve(max([span, *(group.stop for group in prompts)]))
        reading = Reading(self._cache, positions, span, prompts)
        if prompts:
            ids = torch.cat([ids, torch.tensor(prompt_ids, device=self._device)])
            columns = [torch.arange(g.start, g.stop, device=self._device).repeat(g.count) for g in prompts]
            positions = torch.cat([positions, *columns])
        if not len(ids):
            return
        hidden = self._lm.base_model(
            input_ids=ids[None], position_ids=positions[None], reading=reading, use_cache=False
        ).last_hidden_state[0, :count]
        if count:
            self._write(logits_of(self._policy, hidden))

    def _write(self, logits: Tensor) -> None:
        count = len(self.rows)
        place = self._written[:count, None]
        if len(self._barred):
            logits = logits.index_fill(-1, self._barred, float("-inf"))
        if self._sampling.temperature == 0:
            token, scores = most_likely(logits)
        else:
            uniforms = self._uniforms[:count].gather(1, place)[:, 0]
            token, scores = draw(logits, self._sampling.temperature, uniforms)
            self._logprobs[:count].scatter_(1, place, scores[:, None])
        self._broken |= scores.isnan().any()
        self._ids[:count].scatter_(1, place, token[:, None])
        self._token[:count] = token
        self._ended[:count] |= torch.isin(token, self._end_ids)
        self._position[:count] += 1
        self._written[:count] += 1
        for row in self.rows:
            row.written += 1

    def _ended_in_text(self) -> list[bool]:
        """Of each row, whether a stop string has come since the last look."""
        count = self._ends.reach + TOKENS_BETWEEN_LOOKS.get(self._device.type, 1)
        last = self._written[: len(self.rows), None] - torch.arange(count, 0, -1, device=self._device)
        tails = self._ids[: len(self.rows)].gather(1, last.clamp(min=0)).tolist()
        return [
            self._ends.in_text(tail[max(0, count - row.written) :]) for tail, row in zip(tails, self.rows, strict=True)
        ]

    def _let_go(self) -> list[tuple[_Row, list[int], list[float] | None]]:
        """Takes out the rows that are finished; the last ones move to where they were."""
        ended = self._ended[: len(self.rows)].tolist()
        if self._ends.strings:
            ended = [ends or in_text for ends, in_text in zip(ended, self._ended_in_text(), strict=True)]
        finished = [i for i, row in enumerate(self.rows) if ended[i] or row.written == self._sampling.max_new_tokens]
        if not finished:
            return []
        if self._broken:
            raise broken_logits(self._policy.precision)
        rows = [self.rows[i] for i in finished]
        ids = [x[: row.written] for x, row in zip(self._ids[finished].tolist(), rows, strict=True)]
        logprobs: list[list[float] | None] = [None] * len(rows)
        if self._sampling.temperature > 0:
            logprobs = self._logprobs[finished].tolist()

        staying = len(self.rows) - len(finished)
        holes = [i for i in finished if i < staying]
        movers = sorted(set(range(staying, len(self.rows))) - set(finished))
        if holes:
            for x in self._of_rows:
                x[holes] = x[movers]
            longest = max(len(self.rows[i].prompt) + self.rows[i].written for i in movers) - 1
            self._cache.copy(movers, holes, longest)
            for hole, mover in zip(holes, movers, strict=True):
                self.rows[hole] = self.rows[mover]
        del self.rows[staying:]
        return list(zip(rows, ids, logprobs, strict=True))
