"""Tiny random models of every supported kind, and the smallest real config."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPTNeoXConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tbrm.chat import Chat, make_chat
from tbrm.config.recipe import load_sections, parse_config
from tbrm.config.schema import Config
from tbrm.policy.tiny import tiny_tokenizer

hypothesis.settings.register_profile("untimed", deadline=None)  # other jobs run beside
hypothesis.settings.load_profile("untimed")

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = Path(__file__).parent / "recipes" / "tiny.yaml"
"""A recipe of this suite: the tiny model, and a task of another package."""
VOCABULARY = 97

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 8, "query_pre_attn_scalar": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
DENSE: dict[str, Any] = {
    "llama": LlamaConfig(**_SHAPE),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=8),
    # A window of 4 is shorter than the test's trajectories; small caps, so that they bend these small logits.
    "gemma2": Gemma2Config(
        **_SHAPE, **_HEAD, sliding_window=4, final_logit_softcapping=0.5, attn_logit_softcapping=0.2
    ),
    "gemma3": Gemma3TextConfig(
        **_SHAPE, **_HEAD, sliding_window=4, sliding_window_pattern=2, final_logit_softcapping=0.5
    ),
    "cohere": CohereConfig(**_SHAPE, logit_scale=0.25),
}
ARCHITECTURES: dict[str, Any] = {
    **DENSE,
    # Its files call the head embed_out.
    "gpt-neox": GPTNeoXConfig(**_SHAPE, hidden_dropout=0.0, attention_dropout=0.0),
    # Mixtures of experts, whose files hold each expert apart, under four kinds of names; three have saved buffers.
    "mixtral": MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "minimax-m2": MiniMaxM2Config(**_SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "granite-moe": GraniteMoeConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**_SHAPE, **_EXPERTS, num_experts=4, head_dim=8),
    "olmoe": OlmoeConfig(**_SHAPE, num_experts=4, num_experts_per_tok=2),
    "ernie4.5-moe": Ernie4_5_MoeConfig(
        **_SHAPE,
        moe_intermediate_size=16,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "dots1": Dots1Config(**_SHAPE, **_ROUTED),
    "glm4-moe": Glm4MoeConfig(**_SHAPE, **_ROUTED, head_dim=8),
    "deepseek-v3": DeepseekV3Config(**{**_SHAPE, **_ROUTED, **_LATENT, "num_key_value_heads": 4}),
}


def make_lm(architecture: str, *, tied: bool, seed: int = 0, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A random model whose weights are large enough for its options (windows, caps, scales) to matter."""
    config = copy.deepcopy(ARCHITECTURES[architecture])
    config.tie_word_embeddings, config.vocab_size = tied, vocabulary
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        saved = lm.state_dict()
        for name, buffer in lm.named_buffers():
            if name in saved:  # a bias that adds to the router's scores
                torch.nn.init.normal_(buffer, std=0.1)
    return lm


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors: more threads only get in each other's way."""
    torch.set_num_threads(1)


def chat_of(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **sections: dict[str, Any]) -> Chat:
    """How a model is spoken to that has this tokenizer, or the tiny one, by `sections` of a recipe."""
    return make_chat(load_sections(None, model={"name": "tiny"}, **sections), lm, tokenizer or tiny_tokenizer())


def write_model(folder: Path, architecture: str, *, tied: bool = False) -> None:
    """Such a model as transformers saves it, with the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    make_lm(architecture, tied=tied, vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_tree(run_dir: Path, **overrides: Any) -> dict[str, Any]:
    """That recipe, shortened, with `section__key` overrides."""
    tree: dict[str, Any] = yaml.safe_load(TINY.read_text())
    tree["run"]["dir"] = str(run_dir)
    tree["optim"]["learning_rate"] = 1e-3  # YAML 1.1 reads 1e-3 as text
    tree["trainer"]["steps"] = 4
    tree["rollout"].update(prompts=4, samples=2)
    tree["evaluation"] = {"prompts": 5, "every": 2}
    tree["logging"] = {"report": False}  # drawing takes longer than these steps
    for key, value in overrides.items():
        section, _, leaf = key.partition("__")
        if leaf:
            tree.setdefault(section, {})[leaf] = value
        else:
            tree[section] = value
    return tree


def tiny_config(run_dir: Path, **overrides: Any) -> Config:
    return parse_config(tiny_tree(run_dir, **overrides))
