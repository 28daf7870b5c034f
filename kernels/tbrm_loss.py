"""The loss of TBRM in a single pass, and as an operator of torch for whoever traces a model instead of running it.

T tokens, V vocabulary entries, D hidden width, N trajectories.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backends.interface import Needs, RowGrads, TokenStatsOptions, held_dtype
from .backends.registry import select
from .checks import check_head, check_values, needs_gradient, only_described, operand_dtype, temperatures
from .single_pass import Plan, single_pass
from .token_stats import TokenStats
from .token_stats_op import TAGS, or_empty
from .trajectory import (
    check_bounds,
    check_packing,
    check_vector,
    residual_gradients,
    segment_sums,
    trajectory_residual,
)
from .trajectory_loss import differentiable


class TbrmOutput(NamedTuple):
    """Only `loss` carries a gradient. [N] each, in float32 (float64 for float64 inputs)."""

    loss: Tensor
    """[], the mean of the squared residuals."""
    residuals: Tensor
    """Those of `trajectory_residual`."""
    values: Tensor
    """V(s_1); 0 for an empty trajectory."""
    logprob_sums: Tensor
    """sum_h log pi(a_h|s_h)."""


def fused_linear_tbrm_loss(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64
    cu_seqlens: Tensor,  # [N + 1] int32 or int64, rising from 0 to T
    ref_logprob_sums: Tensor,  # [N] float32
    rewards: Tensor,  # [N] float32
    *,
    beta: float,
    ref_values: Tensor | None = None,  # [N] float32
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # or [T]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
    tp_group: dist.ProcessGroup | None = None,
) -> TbrmOutput:
    """The TBRM loss of packed trajectories (arXiv 2505.15311), from hidden states to gradients in a single pass:

        loss     = mean of residual^2 over the N trajectories; 0 if there are none
        residual = V(s_1) [- V_ref(s_1)] + sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h) - R / beta

    with log pi and V of Q = logits / temperature, where

        logits = logit_scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap) if softcap is given

    The [T, V] logits are never held: the gradients of hidden, weight and bias are computed here, chunk by chunk, and the
    backward pass scales them and hands them out, once. Products and sums are in float32 (float64 for float64). A factor
    put on the loss that is no power of 2 rounds bfloat16 gradients a second time. Under torch.autocast, hidden and weight
    are first rounded to its dtype. In a model under torch.compile it is one operation of the graph (with `tp_group` the
    graph breaks here). An empty trajectory has residual 0 and no gradient.

    Args:
        hidden: [T, D], the hidden states that predict the targets, as they go into the head (after the last norm), batch and
            sequence flattened: bfloat16, float16, float32 or float64, on any device. T may be 0.
        weight: [V, D], the head's weight, of hidden's dtype and on its device, as all tensors are.
        targets: [T] int64, the token taken at each position, in [0, V), or `ignore_index`.
        cu_seqlens: [N + 1] int32 or int64, rising from 0 to T: trajectory i owns tokens cu_seqlens[i]:cu_seqlens[i + 1]. The
            tokens are the policy's actions and nothing else: leave those of prompts and tools out before packing.
        ref_logprob_sums: [N] float32 (float64 for float64 inputs), sum_h log pi_ref(a_h|s_h) of each trajectory, in nats:
            `segment_sums` of the reference's `linear_token_stats(...).logprobs`. Where policy and reference agree, the
            sums cancel exactly if they come from there.
        rewards: [N] of that dtype, R of each trajectory.
        beta: what a nat of KL divergence from the reference costs, in units of reward; finite and above 0.
        ref_values: [N] of that dtype, V_ref(s_1) in nats: the residual is then the calibrated one of ReVal. None: not
            subtracted.
        bias: [V], added to the products hidden @ weight.T, of any of hidden's dtypes; None for a head without.
        temperature: divides the logits; above 0. A number, or [T] floating-point, one for each token: rollouts that were
            sampled at several share a batch. It gets no gradient.
        softcap: logits become softcap * tanh(logits / softcap); above 0. None for none.
        logit_scale: multiplies the logits before that; above 0.
        ignore_index: targets of this value are left out: their statistics are 0, and no gradient comes from them.
        max_chunk_bytes: of scratch memory for the logits of a chunk of whole trajectories. If None, 1 KiB x V on a CPU (512
            tokens in bfloat16, 256 in float32) and 16 KiB x V on a GPU (8192 and 4096); but where all T tokens take no more
            than that and the sum that the weight's gradient needs beside it over several chunks (of a 16-bit weight 2 V D
            on a CPU, 4 V D on a GPU), one chunk takes them all. A trajectory that does not fit is computed twice instead,
            in pieces that do: four products.
        backend: "auto" takes the first that can run of those that `backends()` lists: "cpu" (C++), "triton" (NVIDIA GPUs),
            "torch" (everywhere). A name takes that one.
        tp_group: processes over which the vocabulary is divided. Each passes the same hidden and targets and its own rows
            of weight and bias, in the order of ranks; all get the statistics over the whole vocabulary, and hidden's
            gradient, by collectives. The loss must be the same on all of them.

    Returns:
        `TbrmOutput`: the loss [], which alone carries a gradient, and residuals, values and logprob_sums, [N] each, in nats.

    Raises:
        TypeError: for what is no tensor (a DTensor is none here), for dtypes that do not fit, and for a vector [N] on another
            device than hidden's.
        ValueError: for shapes that do not fit, tensors on several devices, targets out of range, bounds that do not rise
            from 0 to T, a number that is not above 0, and a backend of an unknown name. On a GPU a wrong value in a tensor
            is found by a device-side assertion: reading it here would wait for the device.
        RuntimeError: for a backend that cannot run here, with the reason; from the backward pass, if a second derivative is
            asked for, or a second backward pass over the same graph.
    """
    check_head(hidden, weight, targets, bias, temperature)
    check_packing("targets", targets, cu_seqlens)
    dtype = operand_dtype(hidden, weight)
    stats_dtype = TokenStatsOptions(dtype).compute_dtype
    for name, tensor in {"ref_logprob_sums": ref_logprob_sums, "rewards": rewards, "ref_values": ref_values}.items():
        if tensor is not None:
            check_vector(name, tensor, cu_seqlens.shape[0] - 1, stats_dtype, hidden.device)
    temperature = temperatures(temperature, dtype)
    scores = (ref_logprob_sums, rewards, ref_values, beta)
    if tp_group is None and only_described(hidden):
        number, each = (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
        scaling = (number, softcap, logit_scale, ignore_index)
        needs = [needs_gradient(x) for x in (hidden, weight, bias)]
        inputs = (hidden, weight, bias, targets, each, cu_seqlens)
        return TbrmOutput(*tbrm_loss_op(*inputs, *scores, needs, dtype, *scaling, max_chunk_bytes, backend)[:4])
    options = TokenStatsOptions(dtype, temperature, softcap, logit_scale, False, ignore_index)
    return _now((hidden, weight, bias, targets), cu_seqlens, scores, options, backend, max_chunk_bytes, tp_group)


Scores = tuple[Tensor, Tensor, Tensor | None, float]
"""ref_logprob_sums, rewards, ref_values and beta."""


@torch.compiler.disable
def _now(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    cu_seqlens: Tensor,
    scores: Scores,
    options: TokenStatsOptions,
    backend: str,
    max_chunk_bytes: int | None,
    group: dist.ProcessGroup | None,
) -> TbrmOutput:
    loss_of = _SquaredResiduals(cu_seqlens.shape[0] - 1, scores)
    loss, stats = differentiable(inputs, cu_seqlens, lambda **_: loss_of, options, backend, max_chunk_bytes, group)
    return TbrmOutput(loss, *loss_of.vectors(like=stats.lse))


class _SquaredResiduals:
    """The loss of a chunk and its derivatives; keeps the residuals, values and sums of its trajectories."""

    grads = ()

    def __init__(self, n_trajectories: int, scores: Scores) -> None:
        self._n = max(1, n_trajectories)
        self._scores = scores
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(
        self, stats: TokenStats, tokens: slice, cu_seqlens: Tensor, first: int, differentiate: bool
    ) -> tuple[Tensor, RowGrads | None]:
        here = slice(first, first + cu_seqlens.shape[0] - 1)
        *vectors, beta = self._scores
        sums, rewards, values = (None if x is None else x[here] for x in vectors)
        with torch.no_grad():
            residual = trajectory_residual(*stats[:2], cu_seqlens, sums, rewards, beta, ref_values=values)
            starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
            first_values = torch.cat([stats.lse, stats.lse.new_zeros(1)])[starts] * (lengths > 0)
            self._parts.append((residual, first_values, segment_sums(stats.logprobs, cu_seqlens)))
            loss = residual.square().sum() / self._n
            if not differentiate:
                return loss, None
            of_residual = residual * (2 / self._n)
            return loss, RowGrads(*residual_gradients(of_residual, cu_seqlens, stats.lse.shape[0]), None)

    def vectors(self, like: Tensor) -> tuple[Tensor, ...]:
        """The residuals, values and sums of all trajectories, [N] each."""
        if not self._parts:
            return tuple(like.new_zeros(0) for _ in range(3))
        return tuple(torch.cat(parts) for parts in zip(*self._parts, strict=True))


@torch.library.custom_op(f"{__package__}::fused_linear_tbrm_loss", mutates_args=(), tags=TAGS)
def tbrm_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    cu_seqlens: Tensor,
    ref_logprob_sums: Tensor,
    rewards: Tensor,
    ref_values: Tensor | None,
    beta: float,
    needs: list[bool],
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    max_chunk_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `TbrmOutput` has, and the gradients of hidden, weight and bias, yet to be scaled; empty where not needed."""
    each = temperature if temperatures is None else temperatures
    options = TokenStatsOptions(dtype, each, softcap, logit_scale, False, ignore_index)
    check_values(targets, weight.shape[0], options)
    check_bounds("targets", targets, cu_seqlens)
    loss_of = _SquaredResiduals(cu_seqlens.shape[0] - 1, (ref_logprob_sums, rewards, ref_values, beta))
    chosen = select(backend, hidden.device, dtype)
    plan = Plan(cu_seqlens, options, chosen, max_chunk_bytes, Needs(*needs), any(needs))
    loss, stats, grads = single_pass(hidden, weight, bias, targets, loss_of, plan)
    residuals, values, sums = loss_of.vectors(like=stats.lse)
    grad_hidden, grad_weight, grad_bias = (or_empty(grad, hidden) for grad in grads)
    return loss, residuals, values, sums, grad_hidden, grad_weight, grad_bias


@tbrm_loss_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    cu_seqlens: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs, dtype = rest[4:6]
    n, vector = cu_seqlens.shape[0] - 1, hidden.new_empty(0, dtype=TokenStatsOptions(dtype).compute_dtype)
    grads = [
        hidden.new_empty(0) if x is None or not needed else x.new_empty(x.shape, dtype=held_dtype(x.dtype))
        for x, needed in zip((hidden, weight, bias), needs, strict=True)
    ]
    return vector.new_empty(()), vector.new_empty(n), vector.new_empty(n), vector.new_empty(n), *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[10]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = [
        (grad * grad_loss).to(dtype) if needed else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ]
    return (*grads, *(None,) * (len(ctx.needs_input_grad) - 3))


tbrm_loss_op.register_autograd(_backward, setup_context=_setup_context)
