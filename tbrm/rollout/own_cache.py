"""The embedded engine of models that are read in rows: transformers' `generate`, with the cache of each model's own layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tbrm.policy.ends import Ends
from tbrm.policy.generation import generation_mode
from tbrm.reporting.progress import Watch, unwatched
from tbrm.rollout.choose import draw, most_likely
from tbrm.rollout.in_process import InProcessEngine, broken_logits, noise
from tbrm.rollout.interface import Request, Response, Sampling, derive_seed


class OwnCacheEngine(InProcessEngine):
    """To prompts of one length at a time: padding before a prompt would be state, too."""

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, watch: Watch = unwatched
    ) -> list[list[Response]]:
        answers: list[list[Response]] = [[] for _ in requests]
        wanted = sorted(
            ((i, sample) for i, request in enumerate(requests) for sample in range(request.samples)),
            key=lambda each: (len(requests[each[0]].prompt), each),
        )
        with generation_mode(self.policy) as lm:
            while wanted:
                length = len(requests[wanted[0][0]].prompt)
                alike = [each for each in wanted[: self.batch_size] if len(requests[each[0]].prompt) == length]
                wanted = wanted[len(alike) :]
                seeds = [derive_seed(requests[i].seed, sample) for i, sample in alike]
                written = self._write(lm, [requests[i].prompt for i, _ in alike], seeds, sampling)
                for (i, _), response in zip(alike, written, strict=True):
                    answers[i].append(response)
                watch(len(alike))
        return answers

    def _write(self, lm: Any, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Response]:
        ids = torch.tensor(prompts, device=self.policy.device)
        choose = _Choose(seeds, sampling, self._barred, self.policy.device)
        own, lm.generation_config = lm.generation_config, GenerationConfig(do_sample=False, use_cache=True)
        try:
            whole = lm.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=0,  # no row is padded: they end together
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([_AllEnded(self.ends, ids.shape[1])]),
                synced_gpus=False,  # the weights are all here, and other processes have other prompts
            )
        finally:
            lm.generation_config = own
        if choose.broken:
            raise broken_logits(self.policy.precision)
        logprobs = torch.stack(choose.logprobs, dim=1).tolist() if choose.logprobs else [None] * len(prompts)
        return [
            self._response(row, scores) for row, scores in zip(whole[:, ids.shape[1] :].tolist(), logprobs, strict=True)
        ]


class _Choose(LogitsProcessor):
    """Draws each row's token as the embedded engine does, and leaves `generate` no other."""

    def __init__(self, seeds: list[int], sampling: Sampling, barred: Sequence[int], device: torch.device) -> None:
        self.logprobs: list[Tensor] = []
        self.broken = False
        self._temperature = sampling.temperature
        self._barred = torch.tensor(barred, dtype=torch.int64, device=device)
        self._uniforms = torch.stack([noise(seed, sampling.max_new_tokens) for seed in seeds], dim=1).to(device)
        self._written = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self._barred):
            scores = scores.index_fill(-1, self._barred, float("-inf"))
        if self._temperature == 0:
            token, found = most_likely(scores)
        else:
            token, found = draw(scores.clone(), self._temperature, self._uniforms[self._written])
            self.logprobs.append(found)
        self._written += 1
        self.broken = self.broken or bool(found.isnan().any())
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


class _AllEnded(StoppingCriteria):
    """When each row has come to its end. A row that ends earlier goes on, and is cut."""

    def __init__(self, ends: Ends, prompt: int) -> None:
        self._ends = ends
        self._prompt = prompt
        self._open: list[int] | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        # Only what the last token may have ended: the earlier ones were looked at when they were the last.
        tails = input_ids[:, max(self._prompt, input_ids.shape[1] - self._ends.reach) :].tolist()
        waiting = range(len(tails)) if self._open is None else self._open
        self._open = [row for row in waiting if self._ends.length(tails[row]) is None]
        return torch.full((len(tails),), not self._open, device=input_ids.device, dtype=torch.bool)
