"""The kernels in a training loop of one's own: torch, a transformers model and `tbrm_kernels`, nothing of the trainer.

A small model that knows nothing learns to say the token that it was given. What it needs is `pip install tbrm transformers`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tbrm_kernels import fused_linear_tbrm_loss, linear_token_stats, segment_sums

VOCABULARY, LENGTH, TRAJECTORIES, STEPS = 16, 4, 64, 120
BETA = 0.05  # a reward of 1 is 20 nats; V(s_1) begins at log 16 = 2.8


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, prompts: Tensor) -> Tensor:
    """Prompts [N, 1] and a response to each, [N, 1 + LENGTH]."""
    tokens = prompts
    for _ in range(LENGTH):
        probabilities = model(tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, probabilities.multinomial(1)], dim=1)
    return tokens


def hidden_states(model: Qwen3ForCausalLM, tokens: Tensor) -> Tensor:
    """[T, D]: those that predict the tokens of the responses, trajectory after trajectory."""
    return model.model(tokens).last_hidden_state[:, :-1].flatten(0, 1)


torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, num_attention_heads=2, num_key_value_heads=1, **size))
reference = copy.deepcopy(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
cu_seqlens = torch.arange(0, TRAJECTORIES * LENGTH + 1, LENGTH)
learnt = []
for step in range(1, STEPS + 1):
    tokens = sample(model, torch.randint(VOCABULARY, (TRAJECTORIES, 1)))
    targets = tokens[:, 1:].flatten()
    rewards = (tokens[:, 1:] == tokens[:, :1]).float().mean(dim=1)
    with torch.no_grad():
        scores = linear_token_stats(hidden_states(reference, tokens), reference.lm_head.weight, targets)
        ref_sums = segment_sums(scores.logprobs, cu_seqlens)
    hidden, weight = hidden_states(model, tokens), model.lm_head.weight
    out = fused_linear_tbrm_loss(hidden, weight, targets, cu_seqlens, ref_sums, rewards, beta=BETA)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    learnt.append(rewards.mean().item())
    if step % 30 == 0:
        print(f"step {step}: reward {learnt[-1]:.2f}, V(s_1) {out.values.mean():.1f}, loss {out.loss:.1f}")
print(f"mean reward of sampled responses: {learnt[0]:.2f} -> {learnt[-1]:.2f}")
