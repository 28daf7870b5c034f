"""The embedded engine: transformers' `generate` on the policy itself, so there are no weights to send anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tbrm.data import common_prefix
from tbrm.model import PolicyModel
from tbrm.rollout.base import Response, Sampling, derive_seed


class EmbeddedEngine:
    """Generates in padded batches of prompts of similar length."""

    def __init__(self, policy: PolicyModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.policy = policy
        self.batch_size = batch_size
        self.eos_ids = end_token_ids(policy.lm, tokenizer)
        # A sliding window counts the padding between the prefix and the rest, and so would see too little.
        text = policy.lm.config.get_text_config()
        layers = getattr(text, "layer_types", None) or [getattr(text, "sliding_window", None) and "sliding_attention"]
        self._may_share_prefix = "sliding_attention" not in layers
        self._version = 0
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]

    def update_weights(self, version: int) -> dict[str, float]:
        self._version = version  # the weights are the policy's own
        return {}

    def close(self) -> None:
        pass

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], samples: int, sampling: Sampling) -> list[list[Response]]:
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        # Up to batch_size rows at once, whole prompts at a time; a prompt with more samples than that is dealt in parts.
        rows = min(samples, self.batch_size)
        per_batch = max(1, self.batch_size // rows)
        responses: list[list[Response]] = [[] for _ in prompts]
        with self.policy.generation_mode() as lm, _generation_config(lm, self._generation_config(sampling)):
            for start in range(0, len(prompts), per_batch):
                members = by_length[start : start + per_batch]
                for drawn in range(0, samples, rows):
                    count = min(rows, samples - drawn)
                    seed = derive_seed(sampling.seed, start, drawn)
                    tokens = self._generate_batch(lm, [prompts[i] for i in members], count, seed)
                    for row, ids in enumerate(tokens.tolist()):
                        responses[members[row // count]].append(self._response(ids))
        return responses

    def _generate_batch(self, lm: PreTrainedModel, prompts: list[list[int]], samples: int, seed: int) -> Tensor:
        """[len(prompts) * samples, new tokens], the samples of a prompt next to each other.

        What all prompts begin with is read once, and each prompt once for all of its samples. Padding stands between the two.
        """
        prefix = common_prefix(prompts) if self._may_share_prefix and len(prompts) > 1 else 0
        width = max(map(len, prompts))
        ids = torch.tensor(
            [p[:prefix] + [self._pad_id] * (width - len(p)) + p[prefix:] for p in prompts], device=lm.device
        )
        kept = [[1] * prefix + [0] * (width - len(p)) + [1] * (len(p) - prefix) for p in prompts]
        mask = torch.tensor(kept, device=lm.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=lm.config)

        def read(rows: int, start: int, stop: int) -> None:
            lm.base_model(
                input_ids=ids[:rows, start:stop],
                attention_mask=mask[:rows, :stop],
                position_ids=positions[:rows, start:stop],
                past_key_values=cache,
            )

        if prefix:
            read(1, 0, prefix)
            cache.batch_repeat_interleave(len(prompts))
        if samples > 1 and width > 1:
            if prefix < width - 1:
                read(len(prompts), prefix, width - 1)
            cache.batch_repeat_interleave(samples)
        ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
            torch.manual_seed(seed)
            output: Tensor = lm.generate(ids, attention_mask=mask, past_key_values=cache)  # type: ignore[operator]
        return output[:, width:]

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        greedy = sampling.temperature == 0
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            temperature=1.0 if greedy else sampling.temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=self.eos_ids,
            pad_token_id=self._pad_id,
        )

    def _response(self, ids: list[int]) -> Response:
        for length, token in enumerate(ids, start=1):
            if token in self.eos_ids:
                return Response(ids[:length], truncated=False, weight_version=self._version)
        return Response(ids, truncated=True, weight_version=self._version)


@contextmanager
def _generation_config(lm: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Puts `config` in the place of the model's own, whose defaults (top_k, repetition_penalty) `generate` would else
    fill in and so bias what is sampled."""
    own = lm.generation_config
    lm.generation_config = config
    try:
        yield
    finally:
        lm.generation_config = own


def end_token_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: all of the generation config's, else the tokenizer's one."""
    ids = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        raise ValueError(
            "model.name: the model names no end-of-sequence token, in generation_config or tokenizer; set one"
        )
    return [ids] if isinstance(ids, int) else list(ids)
