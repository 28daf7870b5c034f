"""Residuals of packed trajectories.

Packing: trajectory i owns tokens cu_seqlens[i]:cu_seqlens[i + 1] of every [T] tensor; N trajectories, T tokens.
The tokens are the policy's actions and nothing else: leave prompt, tool and user tokens out before packing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .backends import triton
from .backends.registry import select


@torch.compiler.disable
def segment_sums(
    values: Tensor,  # [T] float
    cu_seqlens: Tensor,  # [N + 1] int32 or int64, rising from 0 to T
) -> Tensor:
    """The sum of `values` over each trajectory. Differentiable and deterministic.

    Summed in float64: thousands of float32 log-probs added in float32 lose enough to show in the difference of two such sums.

    Args:
        values: [T], of any floating-point dtype: the log-probs of packed trajectories, say.
        cu_seqlens: [N + 1] int32 or int64, on the same device, rising from 0 to T: trajectory i owns
            values[cu_seqlens[i] : cu_seqlens[i + 1]].

    Returns:
        [N], in the dtype of `values`; 0 for an empty trajectory.

    Raises:
        TypeError: for what is no tensor, and for shapes or dtypes that do not fit.
        ValueError: for tensors on two devices, and for bounds that do not rise from 0 to T. On a GPU those are found by a
            device-side assertion: reading them here would wait for the device.
    """
    _check_floats("values", values)
    check_packing("values", values, cu_seqlens)
    check_bounds("values", values, cu_seqlens)
    if _has_kernel(values):
        return triton.Residual.apply(values, None, cu_seqlens)
    return _segment_sums(values, cu_seqlens)


@torch.compiler.disable
def trajectory_residual(
    logprobs: Tensor,  # [T] float
    lse: Tensor,  # [T] float
    cu_seqlens: Tensor,  # [N + 1] int32 or int64, rising from 0 to T
    ref_logprob_sums: Tensor,  # [N]
    rewards: Tensor,  # [N]
    beta: float,
    *,
    ref_values: Tensor | None = None,  # [N]
) -> Tensor:
    """The trajectory Bellman residual (arXiv 2505.15311), of statistics that `linear_token_stats` made:

        V(s_1) [- V_ref(s_1)] + sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h) - R / beta

    V(s_1) is `lse` at the first token of the trajectory. An empty trajectory has residual 0 and no gradient: no action was
    taken, so there is nothing to correct. Differentiable in `logprobs` and `lse`.

    Args:
        logprobs: [T] floating-point, log pi of each token taken, in nats.
        lse: [T], of the same dtype and on the same device, as all tensors are: V(s) at each token, in nats.
        cu_seqlens: [N + 1] int32 or int64, rising from 0 to T: trajectory i owns tokens cu_seqlens[i]:cu_seqlens[i + 1].
        ref_logprob_sums: [N] of that dtype, sum_h log pi_ref(a_h|s_h), in nats. Where policy and reference agree, the sums
            cancel exactly if these come from `segment_sums`.
        rewards: [N] of that dtype, R of each trajectory.
        beta: what a nat of KL divergence from the reference costs, in units of reward; finite and above 0.
        ref_values: [N] of that dtype, V_ref(s_1) in nats: the value is then measured against the reference's, and the
            residual is the calibrated one of ReVal ("Off-Policy Value-Based RL for LLMs"). None: not subtracted.

    Returns:
        [N], in nats, in the dtype of `logprobs`.

    Raises:
        TypeError: for what is no tensor, and for dtypes or devices that do not fit.
        ValueError: for shapes that do not fit, a beta that is not above 0, and bounds that do not rise from 0 to T. On a GPU
            the bounds are checked by a device-side assertion: reading them here would wait for the device.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta!r}: it must be a finite number above 0")
    _check_floats("logprobs", logprobs)
    check_packing("logprobs", logprobs, cu_seqlens)
    check_bounds("logprobs", logprobs, cu_seqlens)
    n_tokens, n_trajectories = logprobs.shape[0], cu_seqlens.shape[0] - 1
    check_vector("lse", lse, n_tokens, logprobs.dtype, logprobs.device)
    for name, tensor in {"ref_logprob_sums": ref_logprob_sums, "rewards": rewards, "ref_values": ref_values}.items():
        if tensor is not None:
            check_vector(name, tensor, n_trajectories, logprobs.dtype, logprobs.device)

    if _has_kernel(logprobs):
        return triton.Residual.apply(logprobs, lse, cu_seqlens, ref_logprob_sums, rewards, ref_values, beta)
    starts, stops = cu_seqlens[:-1], cu_seqlens[1:]
    # The extra element gives an empty trajectory at the very end a place to point at.
    values = torch.cat([lse, lse.new_zeros(1)]).index_select(0, starts)
    if ref_values is not None:
        values = values - ref_values
    log_ratios = _segment_sums(logprobs, cu_seqlens) - ref_logprob_sums
    return torch.where(stops > starts, values + log_ratios - rewards / beta, 0)


def _segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, unsafe=True).to(values.dtype)


def residual_gradients(
    grad_residual: Tensor,  # [N], the loss's derivatives by the residuals
    cu_seqlens: Tensor,  # [N + 1]
    n_tokens: int,
) -> tuple[Tensor, Tensor]:
    """The loss's derivatives by the logprobs and the lse, [T] each: what autograd makes of `trajectory_residual`."""
    if _has_kernel(grad_residual):
        return triton.residual_gradients(grad_residual, cu_seqlens, n_tokens)
    lengths = cu_seqlens.diff()
    grad_logprobs = grad_residual.repeat_interleave(lengths, output_size=n_tokens)
    # The extra element gives an empty trajectory at the very end a place to point at.
    grad_lse = grad_residual.new_zeros(n_tokens + 1).index_add_(0, cu_seqlens[:-1], grad_residual * (lengths > 0))
    return grad_logprobs, grad_lse[:-1]


def _has_kernel(values: Tensor) -> bool:
    return values.dtype == torch.float32 and select("auto", values.device, values.dtype) is triton


def check_tensors(**arguments: Any) -> None:
    """Raises TypeError for what is no tensor."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            continue
        advice = f"pass its weight, {name}.weight" if isinstance(value, torch.nn.Module) else "pass a torch.Tensor"
        raise TypeError(f"{name} is a {type(value).__name__}: {advice}")


def check_vector(name: str, tensor: Tensor, length: int, dtype: torch.dtype, device: torch.device) -> None:
    check_tensors(**{name: tensor})
    if tensor.shape != (length,):
        raise ValueError(f"{name} has shape {list(tensor.shape)}: it must be [{length}]")
    if tensor.dtype != dtype or tensor.device != device:
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}: it must be {dtype} on {device}, as logprobs is")


def _check_floats(name: str, values: Tensor) -> None:
    check_tensors(**{name: values})
    if values.dim() != 1 or not values.is_floating_point():
        raise TypeError(f"{name} is {list(values.shape)} {values.dtype}: it must be [T] and floating-point")


def check_packing(name: str, values: Tensor, cu_seqlens: Tensor) -> None:
    """That `cu_seqlens` may divide the [T] tensor called `name`, going by its shape, dtype and device."""
    check_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens is {list(cu_seqlens.shape)} {cu_seqlens.dtype}: wanted [N + 1], int32 or int64")
    if cu_seqlens.device != values.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and {name} on {values.device}: move them to one device")


def check_bounds(name: str, values: Tensor, cu_seqlens: Tensor) -> None:
    """That it does, going by its values too."""
    n_tokens = values.shape[0]
    wanted = f"cu_seqlens must rise from 0 to T = {n_tokens}"
    fits = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == n_tokens) & (cu_seqlens.diff() >= 0).all()
    if cu_seqlens.device.type == "cuda":
        torch._assert_async(fits, wanted)  # reading the answer here would be a sync point
    elif not fits:
        raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()}: {wanted}")
