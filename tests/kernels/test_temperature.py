"""A temperature for each token: rollouts that were sampled at several share a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tbrm_kernels import TokenStats, fused_linear_trajectory_loss, linear_token_stats
from tests.kernels import heads, packed
from tests.kernels.heads import random_head, seeded
from tests.kernels.packed import CHUNKS, LENGTHS, bounds, chunk_bytes, gradients_of, leaves_of, per_token

pytestmark = pytest.mark.usefixtures("backend")


def temperatures(tokens: int) -> Tensor:
    return 0.3 + 1.7 * torch.rand(tokens, generator=seeded(4))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_and_gradients(
    dtype: torch.dtype, entropy: bool, softcap: float | None, set_tiles: Callable[[int, int], None]
) -> None:
    set_tiles(16, 16 * 50)
    head = random_head(41, 211, 24, dtype)
    heads.assert_as_good_as_plain_torch(
        head, slack=16, temperature=temperatures(41), entropy=entropy, softcap=softcap, logit_scale=1.5
    )


@pytest.mark.parametrize("tokens", CHUNKS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_single_pass(dtype: torch.dtype, softcap: float | None, tokens: int | None) -> None:
    head = random_head(sum(LENGTHS), 300, 9, dtype)
    packed.assert_as_good_as_plain_torch(
        head, LENGTHS, tokens, temperature=temperatures(sum(LENGTHS)), softcap=softcap, logit_scale=1.5
    )


@pytest.mark.parametrize("tokens", CHUNKS)
def test_a_capped_entropy_in_the_single_pass(tokens: int | None) -> None:
    head = random_head(sum(LENGTHS), 300, 9)
    options = {"temperature": temperatures(sum(LENGTHS)), "softcap": 5.0, "entropy": True}
    fused, recomputed = leaves_of(head), leaves_of(head)
    loss, _ = fused_linear_trajectory_loss(
        targets=head.targets,
        cu_seqlens=bounds(LENGTHS),
        loss_fn=per_token,
        max_chunk_bytes=chunk_bytes(tokens, head),
        **fused,
        **options,
    )
    stats = linear_token_stats(targets=head.targets, **recomputed, **options)
    expected = gradients_of(per_token(stats, bounds(LENGTHS), 0), recomputed)
    for name, grad in gradients_of(loss, fused).items():
        packed.assert_near(grad, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_is_what_that_temperature_makes_of_it(dtype: torch.dtype) -> None:
    head = random_head(37, 150, 24, dtype)
    levels = torch.tensor([0.5, 1.0, 3.0])
    which = torch.arange(37) % 3
    inputs = {"hidden": head.hidden, "weight": head.weight, "targets": head.targets, "entropy": True}
    mixed = linear_token_stats(**inputs, temperature=levels[which].double().repeat_interleave(2)[::2])
    for i, level in enumerate(levels.tolist()):
        alone = linear_token_stats(**inputs, temperature=level)
        for ours, wanted in zip(mixed, alone, strict=True):
            assert ours is not None and wanted is not None
            torch.testing.assert_close(ours[which == i], wanted[which == i], rtol=2e-6, atol=1e-5)


def test_a_temperature_gets_no_gradient_and_the_loss_may_use_it() -> None:
    head = random_head(sum(LENGTHS), 60, 8)
    leaves, temperature = leaves_of(head), temperatures(sum(LENGTHS))

    def at_one(stats: TokenStats, cu_seqlens: Tensor, first: int) -> Tensor:
        return (stats.lse * temperature[: len(stats.lse)]).sum()

    loss, _ = fused_linear_trajectory_loss(
        targets=head.targets, cu_seqlens=bounds(LENGTHS), loss_fn=at_one, temperature=temperature, **leaves
    )
    loss.backward()
    assert temperature.grad is None
    assert leaves["weight"].grad.any()
