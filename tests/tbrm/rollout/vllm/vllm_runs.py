"""What the tests of vLLM share: small models that it can compute on a CPU, and runs of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ForCausalLM

from tbrm.config.schema import Config
from tbrm.policy.model import PolicyModel
from tbrm.policy.tiny import tiny_model, tiny_tokenizer
from tbrm.rollout import RolloutEngine, Sampling, make_requests
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import chat_of, tiny_config
from tests.tbrm.rollout.test_rollout import greedy_by_hand

# Prompts are longer than a block of the prefix cache, so that keys and values of old weights would be used again; and a
# pass takes one of the longest possible.
OPTIONS = {"block_size": 32, "max_num_batched_tokens": 512}
PROMPTS = [[5, *range(6, 60), last] for last in (7, 8, 9)] + [[11, 12]]


def save_model(folder: Path, *, tied: bool) -> Path:
    """The tiny model with weights so large that greedy responses say something, and a head of its own if not `tied`."""
    config = tiny_model(len(tiny_tokenizer()), seed=0).config
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    lm = Qwen3ForCausalLM(config)
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    lm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def vllm_config(
    run_dir: Path, model: Path, engine: str = "vllm", *, adapters: Sequence[str] = (), **vllm: Any
) -> Config:
    """`adapters`: the layers that get one, and are trained so fast that a step shows."""
    settings = {"kv_cache_gib": 1, "start_timeout": 600, "request_timeout": 120, "options": OPTIONS, **vllm}
    lora = {"lora": {"rank": 4, "targets": list(adapters)}, "optim__learning_rate": 0.03} if adapters else {}
    return tiny_config(
        run_dir,
        model__name=str(model),
        rollout__engine=engine,
        rollout__vllm=settings,
        evaluation={"prompts": 0},
        **lora,
    )


@torch.no_grad()
def assert_answers_are_the_policys(engine: RolloutEngine, policy: PolicyModel) -> None:
    """Greedy responses are those of the transformers model, token for token, and the log-probs of sampled ones, too."""
    ends = chat_of(policy.lm).ends.ids
    for prompt, [response] in zip(
        PROMPTS, engine.generate(make_requests(PROMPTS, 1), Sampling(12, temperature=0)), strict=True
    ):
        assert response.token_ids == greedy_by_hand(policy, prompt, ends, 12)
        assert response.truncated == (response.token_ids[-1] not in ends)
    for prompt, responses in zip(
        PROMPTS, engine.generate(make_requests(PROMPTS, 3), Sampling(12, policy.temperature)), strict=True
    ):
        for response in responses:
            ours = policy(pack([Trajectory(prompt, response.token_ids, 0.0)])).logprobs
            torch.testing.assert_close(torch.tensor(response.logprobs), ours, atol=1e-4, rtol=0)
