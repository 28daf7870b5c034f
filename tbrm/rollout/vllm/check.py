"""The check after each sync: does the engine compute what the trainer computes?

The engine continues a fixed prompt by a few sampled tokens, and the trainer's own log-probs of these tokens are compared
with the engine's. Sampled ones, for the likeliest token's log-prob may be near 0 under any weights. The prompt is longer
than a block of vLLM's prefix cache, and the same each time, so keys and values of old weights show too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedTokenizerBase

from tbrm.config.section import ConfigError
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import weights_of
from tbrm.rollout.interface import Response
from tbrm.rollout.vllm.server import sampling_params
from tbrm.trajectories.trajectory import Trajectory

_TEXT = "Weights that are sent must be the weights that answer: one step behind, and 2 + 2 is what it was yesterday. "
_PROMPT_TOKENS = 160  # a block of vLLM's cache has 128 on a CPU, 16 on a GPU
_NEW_TOKENS = 8
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2}

EXPERTS_ON_CPU = (
    "vLLM 0.32 on a CPU computes with wrong experts once weights were loaded anew, whoever sends them: for a mixture of "
    "experts set rollout.engine to embedded there, or take vLLM on a GPU"
)


class StaleWeightsError(RuntimeError):
    """The engine's log-probs are not those of the policy."""


def has_experts(policy: PolicyModel) -> bool:
    return any("expert" in name or "moe" in name for name in weights_of(policy))


def refuse_experts_on_cpu(policy: PolicyModel, vllm_version: str) -> None:
    """Before a server is started for nothing. Raises ConfigError."""
    if policy.device.type == "cpu" and vllm_version.startswith("0.32.") and has_experts(policy):
        raise ConfigError(f"rollout.engine: {EXPERTS_ON_CPU}")


class SyncCheck:
    def __init__(self, policy: PolicyModel, tokenizer: PreTrainedTokenizerBase, limit: float | None) -> None:
        self.policy = policy
        self.limit = limit
        ids: list[int] = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
        self._prompt = (ids * (1 + _PROMPT_TOKENS // len(ids)))[:_PROMPT_TOKENS]
        self.sampling = sampling_params(1, _NEW_TOKENS, policy.temperature, seed=0)

    def prompt(self, max_model_len: int) -> list[int]:
        """For a model that takes so many tokens. Raises ValueError."""
        room = max_model_len - _NEW_TOKENS
        if room < _NEW_TOKENS:
            raise ValueError(
                f"vLLM's model takes {max_model_len} tokens, and the check after a sync wants {2 * _NEW_TOKENS}: raise "
                "max_model_len in rollout.vllm.options"
            )
        return self._prompt[:room]

    @torch.no_grad()
    def __call__(self, responses: Sequence[Response], dtype: torch.dtype, max_model_len: int) -> dict[str, float]:
        """Metrics of responses to `prompt`, one from each engine, whose models are of `dtype`. All processes call it, with
        the same responses. Raises StaleWeightsError."""
        prompt = self.prompt(max_model_len)
        batch = self.policy.layout.pack([Trajectory(prompt, response.token_ids, 0.0) for response in responses])
        # Beside training, the reference is scored meanwhile: by the same model with its adapters off.
        with self.policy.adapters.on() if self.policy.adapters else nullcontext():
            ours = self.policy(batch.to(self.policy.device)).logprobs.float().cpu()
        theirs = torch.tensor([logprob for response in responses for logprob in response.logprobs or []])
        gaps = (ours - theirs).abs().view(len(responses), -1)
        mean = gaps.mean(1).max().item()
        limit = self.limit or max(_LIMITS[dtype], _LIMITS[self.policy.precision])
        if not mean <= limit:
            raise StaleWeightsError(
                f"after the weights were sent, vLLM's log-probs differ from the trainer's by {mean:.3g} in the mean, over "
                f"{_NEW_TOKENS} tokens; rollout.vllm.max_logprob_gap allows {limit:g}. It answers with stale or wrong weights, "
                "and training on its answers would go wrong in silence: do not raise the limit before you know why"
                + (f". {EXPERTS_ON_CPU}" if has_experts(self.policy) else "")
            )
        return {"sync/logprob_gap_mean": mean, "sync/logprob_gap_max": gaps.max().item()}
