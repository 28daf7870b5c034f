"""Every kind of causal language model that the installed transformers has, made tiny, and how it is read.

python -m tests.tbrm.policy.every_model        # writes docs/models.md anew; some minutes
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tbrm.config.model import ModelConfig
from tbrm.policy.layout_choice import length_class, only_rows, settle_layout
from tbrm.policy.model import PolicyModel
from tbrm.trajectories.trajectory import Trajectory

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

CANNOT_BE_MADE = {
    "blt": "hash tables of billions of entries",
    "cohere_compass_text": "its config has no rope for its default layers",
    "dbrx": "its default config has no rope",
    "emu3": "generates images; its text model is no causal language model by itself",
    "gemma4_assistant": "a draft model, without a vocabulary of its own",
    "gemma4_unified_assistant": "a draft model, without a vocabulary of its own",
    "git": "describes images; its vision model is a part of it",
    "mllama": "reads images; its text model is no causal language model by itself",
    "musicgen": "generates audio",
    "musicgen_melody": "generates audio",
    "phi4_multimodal": "its adapters for images and audio are a part of it",
    "qwen4_exp": "its default config lacks what its attention is built from",
    "qwen4_exp_text": "its default config lacks what its attention is built from",
    "reformer": "an encoder unless its config says otherwise",
    "xlnet": "it predicts words in any order",
    "zamba": "its shared layers want more of them than a tiny model has",
    "zamba2": "its shared layers want more of them than a tiny model has",
    "zaya": "its config takes no sizes as small as these",
}
"""Kinds that no tiny text model can be made of, and why."""
ROUNDED = {"xlstm": "its own kernels round to bfloat16, by the length of the call: to 0.01"}
"""Kinds that are not exact to the last digits of float32 by themselves."""

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 97),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "laurel_rank", "state_size", "ssm_state_size"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "mamba_d_state", "linear_num_value_heads"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head"), 16),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "mamba_ngroups", "n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "attention_chunk_size", "index_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout"), 0.0),
    **{"max_position_embeddings": 128, "n_positions": 128, "sliding_window": 4, "index_topk": 64, "num_kv_shared_layers": 0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mamba_n_heads": 4, "mamba_num_heads": 8, "expand": 2},
}  # fmt: skip
"""Under the names that configs have them. A window and chunks are shorter than the trajectories."""
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # of latent attention each head has its own keys
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "youtu"),
        _LATENT,
    ),
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
}
_LEFT_OUT: dict[str, tuple[str, ...]] = {
    "falcon": ("head_dim",),
    "prophetnet": ("num_hidden_layers",),
    "xlstm": ("v_head_dim",),
}


def tiny(kind: str, vocabulary: int = 97) -> PreTrainedModel:
    """A random model of the kind, or of its text model's, whose weights are large enough for its options to matter."""
    config: type[PretrainedConfig] = type(AutoConfig.for_model(kind).get_text_config())
    default = config()
    sizes = {name: size for name, size in _SIZES.items() if _has(default, name) and name not in _LEFT_OUT.get(kind, ())}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(
            config(**{**sizes, **_OWN.get(kind, {}), "vocab_size": vocabulary})
        ).eval()
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return lm


def _has(config: PretrainedConfig, name: str) -> bool:
    with contextlib.suppress(Exception):  # some say what they have by raising errors of their own
        return hasattr(config, name)
    return name in dir(config)


def trajectories() -> list[Trajectory]:
    """Short and long ones, past every window and chunk, some with the same prompt."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=generator).tolist()

    prompts = [ids(3), ids(7), ids(2), ids(9)]
    shapes = ((0, 5), (1, 20), (2, 1), (3, 30), (3, 14), (0, 4))
    return [Trajectory(prompts[prompt], ids(length), 0.0) for prompt, length in shapes]


@torch.no_grad()
def read(kind: str) -> tuple[str, float]:
    """How the kind is read ("packed" or "rows"), and by how much a log-prob or a V(s_1) differs at most from the model's own on
    each trajectory alone. Raises ValueError where it is refused."""
    lm = tiny(kind)
    own = copy.deepcopy(lm)
    policy = PolicyModel(lm, rows=length_class(lm) if only_rows(lm) else None)
    settle_layout(policy, ModelConfig(name="tiny", device="cpu", precision="float32"))
    items, gap = trajectories(), 0.0
    for members in policy.layout.split(items, 64)[0]:
        batch = policy.layout.pack([items[i] for i in members])
        stats = policy(batch)
        for place, i in enumerate(members):
            logprobs, value = alone(own, items[i])
            start, stop = batch.bounds[place : place + 2]
            gap = max(
                gap, (stats.logprobs[start:stop] - logprobs).abs().max().item(), abs(stats.lse[start] - value).item()
            )
    return "rows" if policy.in_rows else "packed", gap


def alone(lm: PreTrainedModel, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """The log-probs of a response and V(s_1), by the model itself."""
    ids = torch.tensor(trajectory.prompt_ids + trajectory.response_ids)
    logits = lm(input_ids=ids[None], use_cache=False).logits[0, len(trajectory.prompt_ids) - 1 :].float()
    return logits[:-1].log_softmax(-1).gather(1, ids[len(trajectory.prompt_ids) :, None])[:, 0], logits[0].logsumexp(-1)


def row(kind: str) -> str:
    """Of the page's table."""
    if kind in CANNOT_BE_MADE:
        return f"| {kind} | not tried | {CANNOT_BE_MADE[kind]} |"
    try:
        return f"| {kind} | {read(kind)[0]} | {ROUNDED.get(kind, '')} |"
    except ValueError as error:
        return f"| {kind} | refused | {reason(error)} |"


def reason(error: ValueError) -> str:
    """Why a kind is refused, in short."""
    why = str(error).partition("is not supported: ")[2]
    if "differ from the model's own" in why:
        return "what stands behind or beside a row changes it, or its head is of another kind"
    return why.partition("); use another model")[0].replace(" (", ": ", 1).replace("|", "/")


def main() -> None:
    transformers.logging.set_verbosity_error()
    head = PAGE.read_text().partition("| kind |")[0]
    rows = [row(kind) for kind in KINDS]
    PAGE.write_text(head + "| kind | read as | why |\n|---|---|---|\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
