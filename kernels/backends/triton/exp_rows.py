"""From the exponentials of `exps.py` to the operands of the gradients' products: a pass over the tokens, none over the logits.

With p = E / S, S = S' + own, own = e^(q - c), and the upstream gradients g of logprobs and u of lse:

    dL/dQ_v = (u - g) p_v + g 1[v = a] = (alpha / S) E'_v        alpha = u - g
    E'_v = E_v, but for the target: E'_a = (u own + g S') / alpha        which loses nothing where own is nearly all of S

so that the factor alpha / S goes to the rows of hidden, and E' differs from E in one entry of each row. Two kinds of rows are
written as a whole: where alpha is 0 (the first token of each trajectory, for TBRM), E' becomes 1[v = a] and the factor g; and
where the entropy H has a gradient w, log p_v comes from E_v, and

    E'_v = E_v (u - g - w (log p_v + H))        E'_a = u own + g S' - w own (log p_a + H)        the factor 1 / S
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels' arguments have no types that mypy knows.
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..interface import RowGrads, TokenStatsOptions
from .exps import Exps
from .launch import Operands
from .tile import kernel, slope

BLOCK, WARPS = 1024, 4


@kernel
def exp_rows_kernel(
    values, hidden, inverse_temperature, targets,  # [T, V], [T, D], [T] or None, [T]
    target_q, shift, others, logprobs, log_sum, entropy,  # [T] each, entropy may be None
    grad_logprobs, grad_lse, grad_entropy,  # [T] each, grad_entropy may be None
    factors, scaled,  # out: [T], [T, D]
    V, D, stride_values, stride_hidden, stride_scaled, ignore_index, factor, outer,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    row = values + t.to(tl.int64) * stride_values
    target = tl.load(targets + t)
    q, g, u = tl.load(target_q + t), tl.load(grad_logprobs + t), tl.load(grad_lse + t)
    own, log_s = tl.exp(q - tl.load(shift + t)), tl.load(log_sum + t)
    alpha = u - g
    at_target = u * own + g * tl.load(others + t)
    kept = target != ignore_index
    if grad_entropy is None:
        row_factor = alpha * tl.exp(-log_s)
        blank = (alpha == 0) | (kept == 0)
        at_target = tl.where(blank, 1.0, at_target / tl.where(blank, 1.0, alpha))
        row_factor = tl.where(blank, g, row_factor)
        for start in range(0, tl.where(blank, V, 0), BLOCK):
            v = start + tl.arange(0, BLOCK)
            tl.store(row + v, tl.zeros([BLOCK], values.dtype.element_ty), mask=v < V)
    else:
        h, w = tl.load(entropy + t), tl.load(grad_entropy + t)
        row_factor = tl.exp(-log_s)
        at_target -= w * own * (tl.load(logprobs + t) + h)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            e = tl.load(row + v, mask=v < V, other=0.0).to(tl.float32)
            x = tl.log(tl.maximum(e, 1e-38)) - log_s  # 1e-38: the product is 0 there all the same
            e = tl.where(kept, e * (alpha - w * (x + h)), 0.0)
            tl.store(row + v, e.to(values.dtype.element_ty), mask=v < V)
    if inverse_temperature is not None:
        by = tl.load(inverse_temperature + t)
        factor, outer = factor * by, outer * by
    if CAPPED:
        at_target *= slope(q, outer)
    row_factor = tl.where(kept, row_factor * factor, 0.0)
    tl.store(factors + t, row_factor)
    tl.debug_barrier()  # the target's entry is written last
    if kept:
        tl.store(row + target, at_target.to(values.dtype.element_ty))
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(hidden + t.to(tl.int64) * stride_hidden + d, mask=d < D, other=0.0).to(tl.float32) * row_factor
        x = tl.where(kept, x, 0.0).to(scaled.dtype.element_ty)
        tl.store(scaled + t.to(tl.int64) * stride_scaled + d, x, mask=d < D)


def exp_rows_(
    exps: Exps, operands: Operands, targets: Tensor, options: TokenStatsOptions, grads: RowGrads
) -> tuple[Tensor, Tensor]:
    """Turns E into E', and gives the factor of each row [T], and hidden times that factor [T, D], in bfloat16.

    dL/dlogits is E' times the factors; zeros where the target is ignored.
    """
    values, hidden, scaling = exps.values, operands.hidden, operands.scaling
    assert values is not None
    factors, scaled = torch.empty_like(exps.shift), torch.empty_like(hidden)
    exp_rows_kernel[(len(targets),)](
        values, hidden, scaling.inverse_temperature, targets,
        exps.target_q, exps.shift, exps.others, exps.logprobs, exps.log_sum, exps.entropy,
        grads.logprobs, grads.lse, grads.entropy, factors, scaled,
        values.shape[1], hidden.shape[1], values.stride(0), hidden.stride(0), scaled.stride(0),
        options.ignore_index, scaling.factor, scaling.outer,
        CAPPED=options.softcap is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return factors, scaled
