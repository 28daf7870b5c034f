"""TBRM's loss inside a Hugging Face `Trainer`: a `compute_loss` of eight lines, over trajectories that somebody recorded.

They are random here, 2,000 of them; a small model learns from their rewards to say the token that it was given. The Trainer
wants accelerate: `pip install tbrm transformers accelerate`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments, set_seed

from tbrm_kernels import fused_linear_tbrm_loss, linear_token_stats, segment_sums

VOCABULARY, LENGTH, BETA = 16, 4, 0.05


def actions(model: Qwen3ForCausalLM, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, D], targets [T] and cu_seqlens of what the policy chose: the rows whose label is not -100."""
    hidden = model.model(inputs["input_ids"], attention_mask=inputs.get("attention_mask")).last_hidden_state[:, :-1]
    labels = inputs["labels"][:, 1:]
    chosen = labels != -100
    return hidden[chosen], labels[chosen], pad(chosen.sum(dim=1).cumsum(dim=0), (1, 0))


class TbrmTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden, targets, cu_seqlens = actions(model, inputs)
        scores = (inputs["ref_sum"], inputs["reward"])
        out = fused_linear_tbrm_loss(hidden, model.lm_head.weight, targets, cu_seqlens, *scores, beta=BETA)
        return (out.loss, {"residuals": out.residuals}) if return_outputs else out.loss


def mean_reward(model: Qwen3ForCausalLM) -> float:
    """Of greedy responses to each token."""
    prompts = torch.arange(VOCABULARY)[:, None]
    greedy = {"max_new_tokens": LENGTH, "do_sample": False, "attention_mask": torch.ones_like(prompts)}
    tokens = model.generate(prompts, **greedy)
    return (tokens[:, 1:] == prompts).float().mean().item()


set_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, num_attention_heads=2, num_key_value_heads=1, **size))
tokens = torch.randint(VOCABULARY, (2000, 1 + LENGTH))
data = {"input_ids": tokens, "labels": tokens.clone(), "reward": (tokens[:, 1:] == tokens[:, :1]).float().mean(dim=1)}
data["labels"][:, 0] = -100
with torch.no_grad():  # before training the model is its own reference
    hidden, targets, cu_seqlens = actions(model, data)
    data["ref_sum"] = segment_sums(linear_token_stats(hidden, model.lm_head.weight, targets).logprobs, cu_seqlens)
rows = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
options = {"num_train_epochs": 6, "per_device_train_batch_size": 64, "learning_rate": 3e-3, "logging_steps": 32}
quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False}
args = TrainingArguments("runs/hf_trainer", **options, **quiet, use_cpu=True)
before = mean_reward(model)
TbrmTrainer(model, args, train_dataset=rows).train()
print(
    f"mean reward of greedy responses: {before:.2f} -> {mean_reward(model):.2f}; in the data {data['reward'].mean():.2f}"
)
