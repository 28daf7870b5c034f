"""The ways to compute the benchmark's loss: ours, plain torch, and other libraries through their public entry points."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from bench.problem import BETA, Problem
from tbrm_kernels import fused_linear_tbrm_loss, linear_token_stats


def single_pass(problem: Problem, tp_group: dist.ProcessGroup | None = None) -> Tensor:
    return fused_linear_tbrm_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.cu_seqlens,
        problem.ref_logprob_sums,
        problem.rewards,
        beta=BETA,
        tp_group=tp_group,
    ).loss


def recompute(problem: Problem) -> Tensor:
    stats = linear_token_stats(problem.hidden, problem.weight, problem.targets)
    return problem.loss(stats.logprobs, stats.lse)


def eager(problem: Problem) -> Tensor:
    return problem.loss(*_logits_statistics(problem.hidden, problem.weight, problem.targets))


def compiled(problem: Problem) -> Tensor:
    return problem.loss(*_compiled()(problem.hidden, problem.weight, problem.targets))


def _logits_statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T).float()
    lse = logits.logsumexp(-1)
    return logits.gather(1, targets[:, None])[:, 0] - lse, lse


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_logits_statistics, dynamic=False)


def liger(problem: Problem) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return problem.loss_of_logprobs(
        -LigerFusedLinearScaledCrossEntropyFunction.apply(problem.hidden, problem.weight, problem.targets)
    )


def trl(problem: Problem) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # 32768 is what its own trainers pass as chunk_size, and () asks for no optional outputs.
    out = ChunkedLogProbFunction.apply(problem.hidden, problem.weight, None, problem.targets, 1.0, 32768, None, 1.0, ())
    return problem.loss_of_logprobs(out[0])


def cut_cross_entropy(problem: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.hidden.is_cuda else "torch_compile"
    nll = linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="none", impl=impl)
    return problem.loss_of_logprobs(-nll)


def torch_linear_cross_entropy(problem: Problem) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # that reduction="none" is computed by its reference path
        nll = torch.nn.functional.linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.targets,
            reduction="none",
            options=torch.nn.LinearCrossEntropyOptions(),
        )
    return problem.loss_of_logprobs(-nll)


WAYS: dict[str, Callable[[Problem], Tensor]] = {
    "tbrm: single pass": single_pass,
    "tbrm: recompute": recompute,
    "torch, eager": eager,
    "torch.compile": compiled,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "Liger-Kernel": liger,
    "TRL kernels": trl,
    "cut-cross-entropy": cut_cross_entropy,
}


FLOOR, ONE_PRODUCT, SCORING = "floor", "one product", "tbrm: scoring"
"""Three bare products without a softmax; one of them; and linear_token_stats without gradients, to compare with that one."""


def step_of(way: str, problem: Problem) -> Callable[[], object]:
    """What is timed."""
    hidden, weight = problem.hidden, problem.weight

    @torch.no_grad()
    def three_products() -> None:
        logits = hidden @ weight.T
        logits @ weight  # in place of their gradient: as many operations
        logits.T @ hidden

    @torch.no_grad()
    def one_product() -> None:
        hidden @ weight.T

    @torch.no_grad()
    def score() -> None:
        linear_token_stats(hidden, weight, problem.targets)

    bare = {FLOOR: three_products, ONE_PRODUCT: one_product, SCORING: score}
    return bare[way] if way in bare else lambda: WAYS[way](problem).backward()
