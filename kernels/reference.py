"""The definition, in plain torch: what every backend is tested against. Clear first, and as slow as that makes it.

    logits   = logit_scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap)
    Q        = logits / temperature
    lse      = logsumexp_v Q_v, the soft value V(s)
    logprobs = Q_target - lse, which is log pi(a|s)
    entropy  = -sum_v p_v log p_v, with p = exp(Q - lse)
    residual = V(s_1) [- V_ref(s_1)] + sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h) - R / beta

The residual is that of TBRM (arXiv 2505.15311); with V_ref it is the calibrated one of ReVal ("Off-Policy Value-Based
RL for LLMs"). All of it is computed in float64 for float64 inputs and in float32 otherwise, and autograd differentiates
it. It holds several tensors of [T, V].
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def token_stats_reference(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or [T]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `linear_token_stats` returns for the same arguments: `(logprobs, lse, entropy)`, each [T]."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    kept = targets != ignore_index

    logits = hidden[kept].to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)[kept, None]
    q = logits / temperature

    def with_zeros_where_ignored(values: Tensor) -> Tensor:
        out = values.new_zeros(targets.shape)
        out[kept] = values
        return out

    log_p = torch.log_softmax(q, dim=-1)
    lse = torch.logsumexp(q, dim=-1)
    logprobs = log_p.gather(1, targets[kept][:, None]).squeeze(1)
    entropies = None
    if entropy:
        finite_log_p = torch.where(log_p == -torch.inf, 0.0, log_p)  # p log p is 0 at p = 0, and so is its gradient
        entropies = with_zeros_where_ignored(-(log_p.exp() * finite_log_p).sum(-1))
    return with_zeros_where_ignored(logprobs), with_zeros_where_ignored(lse), entropies


def trajectory_residual_reference(
    logprobs: Tensor,  # [T]
    lse: Tensor,  # [T]
    cu_seqlens: Tensor,  # [N + 1]
    ref_logprob_sums: Tensor,  # [N]
    rewards: Tensor,  # [N]
    beta: float,
    *,
    ref_values: Tensor | None = None,  # [N]
) -> Tensor:
    """What `trajectory_residual` returns for the same arguments: [N], one trajectory at a time."""
    residuals = logprobs.new_zeros(rewards.shape)
    bounds = cu_seqlens.tolist()
    for i, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue  # no action was taken: nothing to correct
        value = lse[start] if ref_values is None else lse[start] - ref_values[i]
        log_ratio = logprobs[start:stop].sum() - ref_logprob_sums[i]
        residuals[i] = value + log_ratio - rewards[i] / beta
    return residuals
