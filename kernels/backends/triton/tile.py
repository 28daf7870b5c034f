"""What the kernels of this package share: one tile of Q-values, and the loss's derivative with respect to a tile."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Kernels' arguments have no types that mypy knows.
from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

VECTORS = (
    *("targets", "target_q", "shift", "unfit", "logprobs", "lse", "maximum", "log_sum", "entropy", "others"),
    *("grad_logprobs", "grad_lse", "grad_entropy", "grad_out", "factors", "inverse_temperature"),
    *("cu_seqlens", "ref_logprob_sums", "rewards", "ref_values"),
)
kernel = partial(
    triton.jit,
    do_not_specialize=("T", "N", "splits", "group", "tiles", "size", "ignore_index"),
    do_not_specialize_on_alignment=VECTORS,
)
"""One that is compiled once for a model, whatever the number of tokens and wherever a slice of a vector begins."""

LOWEST = tl.constexpr(
    -3.4028234663852886e38
)  # finite, so that a tile masked by a bias of -inf does not become inf - inf

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x in two instructions; below 1.2e-38 it is 0. Triton's own takes five, so that it can give what lies below."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], tl.float32, True, 1)


@triton.jit
def scale(logits, inner, outer, CAPPED: tl.constexpr):
    """Q = outer * tanh(inner * logits) with soft-capping, else inner * logits (`TokenStatsOptions` has the definition)."""
    q = logits * inner
    if CAPPED:
        q = (2 * tl.sigmoid(2 * q) - 1) * outer
    return q


@triton.jit
def per_token(number, inverse_temperature, t, T):
    """The number over the temperature of each token t, [tokens]; itself if all have the one that is in it already."""
    if inverse_temperature is not None:
        number *= tl.load(inverse_temperature + t, mask=t < T, other=1.0)
    return number


@triton.jit
def slope(q, outer):
    """Of the soft-capping, from its outcome: 1 - tanh^2; 0 where a bias of -inf masks."""
    tanh = tl.maximum(q, -outer) / outer
    return 1 - tanh * tanh


@triton.jit
def q_tile(
    hidden, weight, bias, inverse_temperature, t0, v0, T, V, D, stride_hidden, stride_weight, inner, outer,
    CAPPED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Q of tokens t0.. and vocabulary entries v0.., [BLOCK_T, BLOCK_V] float32; -inf beyond the vocabulary's end.

    FACTOR is the dtype of hidden and weight, but in Triton's interpreter, which cannot multiply bfloat16: float32 there.
    """
    products = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    if isinstance(hidden, tl.tensor_descriptor):
        for start in range(0, D, BLOCK_D):
            h = hidden.load([t0, start]).to(FACTOR)
            w = weight.load([v0, start]).to(FACTOR)
            # "tf32x3" concerns float32 alone: three products of the tensor cores, as exact as one in float32.
            products = tl.dot(h, w.T, products, input_precision="tf32x3")
    else:
        # Rows beyond the end are others once more, whose products are masked out later.
        t = ((t0 + tl.arange(0, BLOCK_T)) % T).to(tl.int64)
        v = ((v0 + tl.arange(0, BLOCK_V)) % V).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        h_at = hidden + t[:, None] * stride_hidden + d[None, :]
        w_at = weight + v[:, None] * stride_weight + d[None, :]
        for start in range(0, D, BLOCK_D):
            inside = (d < D - start)[None, :]
            h = tl.load(h_at + start, mask=inside, other=0.0).to(FACTOR)
            w = tl.load(w_at + start, mask=inside, other=0.0).to(FACTOR)
            products = tl.dot(h, w.T, products, input_precision="tf32x3")
    v = v0 + tl.arange(0, BLOCK_V)
    if bias is not None:
        products += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    q = scale(products, inner, outer, CAPPED)
    if inverse_temperature is not None:
        q *= per_token(1.0, inverse_temperature, t0 + tl.arange(0, BLOCK_T), T)[:, None]
    if v0 + BLOCK_V > V:  # a branch, since the comparison would take registers in every tile
        q = tl.where((v < V)[None, :], q, -float("inf"))
    return q


@triton.jit
def derivative(
    q, is_target, kept, maximum, log_sum, entropy, grad_logprobs, grad_lse, grad_entropy, factor, outer,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """The loss's derivative with respect to the products behind a tile of Q [tokens, vocabulary]; 0 in rows not `kept`.

    The other arguments are [tokens], `entropy` and `grad_entropy` None together; `factor` is dQ / dproducts without
    soft-capping, [tokens] or a number, and `outer` [tokens, 1] or a number. With p = e^(Q - lse) and the entropy H:

        dL/dQ_v = g_logprob 1[v = target] + (g_lse - g_logprob) p_v - g_entropy p_v (log p_v + H)

    All but Q and p is kept per token: registers are scarce here.
    """
    x = q - maximum[:, None]
    p = exp(x) * tl.exp(-log_sum)[:, None]
    p_factor = grad_lse - grad_logprobs
    if grad_entropy is None:
        grad = p * (factor * p_factor)[:, None]
    else:
        p_factor -= grad_entropy * (entropy - log_sum)
        # e^-1e4 is 0: the bound only keeps infinities out of the product.
        grad = p * ((factor * p_factor)[:, None] - (factor * grad_entropy)[:, None] * tl.maximum(x, -1e4))
    grad += tl.where(is_target, (factor * grad_logprobs)[:, None], 0.0)
    if CAPPED:
        grad *= slope(q, outer)
    return tl.where(kept[:, None], grad, 0.0)
