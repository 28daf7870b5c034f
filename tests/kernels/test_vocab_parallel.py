"""A head over several processes gives what one process gives: the statistics, the loss, and each its part of the gradients.

Real processes over gloo; the parent only compares.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tbrm_kernels import fused_linear_tbrm_loss, linear_token_stats
from tests.kernels.heads import Head, random_head

LENGTHS = [5, 0, 9, 1, 12]
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"softcap": 5.0, "temperature": 0.7, "logit_scale": 0.5},
    "small chunks, one trajectory in pieces": {"tokens": 6},
    "bfloat16": {"dtype": torch.bfloat16},
    "temperatures": {"softcap": 5.0, "temperature": torch.linspace(0.5, 2.0, sum(LENGTHS))},
    "ignored by a token's id": {"ignore_index": 0},
}


def problem(dtype: torch.dtype = torch.float32) -> Head:
    """A vocabulary that no number of processes divides, with a slice of which a bias of -inf masks the most part."""
    head = random_head(sum(LENGTHS), 103, 24, dtype)
    assert head.bias is not None
    head.bias[80:] = -torch.inf
    head.targets[head.targets >= 80] = 7
    # The first entries of several slices; one case ignores that of the first.
    head.targets[[2, 6, 9, 20]] = torch.tensor([0, 26, 52, 0])
    return head


def run(rows: slice, group: dist.ProcessGroup | None, case: dict[str, Any]) -> list[Tensor]:
    options = dict(case)
    head = problem(options.pop("dtype", torch.float32))
    assert head.bias is not None
    targets = head.targets.where(head.targets != -100, options.get("ignore_index", -100))
    tokens = options.pop("tokens", None)
    results: list[Tensor] = []
    for fused in (False, True):
        hidden = head.hidden.clone().requires_grad_()
        weight, bias = (x[rows].clone().requires_grad_() for x in (head.weight, head.bias))
        shared = {"bias": bias, "tp_group": group, **options}
        if fused:
            n = len(LENGTHS)
            scores = torch.linspace(-3, 1, n), torch.linspace(0, 1, n)
            budget = None if tokens is None else tokens * 4 * len(head.weight)
            out = fused_linear_tbrm_loss(
                hidden,
                weight,
                targets,
                BOUNDS,
                *scores,
                beta=0.5,
                max_chunk_bytes=budget,
                backend="torch",
                **shared,
            )
            out.loss.backward()
            results += [out.loss.detach(), *out[1:]]
        else:
            stats = linear_token_stats(hidden, weight, targets, entropy=True, **shared)
            weights = torch.randn(3, len(targets), generator=torch.Generator().manual_seed(5))
            assert stats.entropy is not None
            sum((w * x).sum() for w, x in zip(weights, stats, strict=True)).backward()
            results += [x.detach() for x in stats]
        grads = [leaf.grad for leaf in (hidden, weight, bias)]
        results += [grad for grad in grads if grad is not None]
    return results


def rows_of(rank: int, size: int) -> slice:
    """Slices of different sizes, as a vocabulary that is not divisible has."""
    per = -(-103 // size)
    return slice(rank * per, min(103, (rank + 1) * per))


def work(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.set_num_threads(1)
    results = {name: run(rows_of(rank, size), dist.group.WORLD, case) for name, case in CASES.items()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_one_process(size: int, tmp_path: Path) -> None:
    mp.spawn(work, (size, str(tmp_path)), nprocs=size)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for name, case in CASES.items():
        expected = run(slice(None), None, case)
        # Each process rounds its part of a gradient.
        rounding = 2**-6 if "dtype" in case else 1e-5
        for rank, part in enumerate(parts):
            rows = rows_of(rank, size)
            for i, (ours, wanted) in enumerate(zip(part[name], expected, strict=True)):
                whole = wanted[rows] if wanted.shape[:1] == (103,) else wanted
                tolerance = {"rtol": rounding, "atol": rounding * whole.abs().max().clamp(min=1).item()}
                torch.testing.assert_close(ours, whole, **tolerance, msg=partial("{}, result {}: {}".format, name, i))
