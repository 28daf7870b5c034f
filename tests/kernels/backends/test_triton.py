"""What the Triton backend does in its own way; all else is tested with the other backends.

Without a GPU its kernels run in Triton's interpreter: numpy, one program after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tbrm_kernels import linear_token_stats
from tbrm_kernels.backends import registry
from tbrm_kernels.backends.interface import TokenStatsOptions
from tests.kernels.heads import (
    DEVICE,
    Head,
    assert_as_good_as_plain_torch,
    random_head,
    seeded,
    values_and_gradients,
)

if not registry.backends(DEVICE)["triton"].usable:
    pytest.skip(registry.backends(DEVICE)["triton"].reason, allow_module_level=True)


from tbrm_kernels.backends.triton import head as triton_head
from tbrm_kernels.backends.triton import launch, logit_rows


@pytest.fixture(autouse=True)
def triton_is_auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    chosen = {name: registry._BACKENDS[name] for name in ("triton", "torch")}
    monkeypatch.setattr(registry, "_BACKENDS", chosen)
    yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_slices_of_the_vocabulary(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass holds the derivatives of one slice at a time; the last slice is narrower than the others."""
    monkeypatch.setattr(triton_head, "SCRATCH_BYTES", 1)
    assert_as_good_as_plain_torch(random_head(37, 300, 24, dtype), entropy=True, softcap=5.0)


@pytest.fixture(params=["TMA", "pointers"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks come through descriptors from compute capability 9.0 on, and through pointers before."""
    monkeypatch.setattr(launch, "has_tma", lambda device: request.param == "TMA")


@pytest.mark.parametrize(
    ("width", "offset", "copied"),
    [
        pytest.param(48, 0, False, id="as a real head"),
        pytest.param(63, 0, True, id="an odd width"),
        pytest.param(48, 1, True, id="a base that is not aligned"),
    ],
)
@pytest.mark.usefixtures("loads")
def test_layouts(width: int, offset: int, copied: bool) -> None:
    head = random_head(37, 150, width)
    weight = torch.empty(150 * width + offset)[offset:].view(150, width).copy_(head.weight)
    assert (launch.aligned(weight) is not weight) is copied
    assert_as_good_as_plain_torch(Head(head.hidden, weight, head.bias, head.targets))


@pytest.mark.usefixtures("loads")
def test_offsets_beyond_32_bits() -> None:
    """Rows so far apart that the last one starts beyond element 2^31. Only the pages that are written take memory."""
    head = random_head(3, 70, 48, ignored=0)
    memory = torch.from_numpy(np.empty(2**31 + 2**20, np.float32)).to(DEVICE)
    hidden = memory.as_strided((3, 48), (2**30, 1)).copy_(head.hidden)
    far = Head(hidden, head.weight, head.bias, head.targets)
    assert launch.aligned(hidden) is hidden
    for name, value in values_and_gradients(linear_token_stats, far).items():
        torch.testing.assert_close(value, values_and_gradients(linear_token_stats, head)[name])


@pytest.mark.parametrize("vocab", [50, 97, 300])
def test_derivatives_take_the_place_of_logits(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit values over 32-bit ones, in rows of several blocks, none of them whole at the end."""
    monkeypatch.setattr(logit_rows, "BLOCK", 32)
    head = random_head(6, vocab, 8)
    options = TokenStatsOptions(torch.bfloat16, entropy=True)
    plain = launch.scaling(options)
    logits = (head.hidden @ head.weight.T).contiguous()
    exact = logits.clone()
    _, stats = logit_rows.row_stats(logits, None, head.targets, options, plain)
    grads = random_grads(6)
    out = logit_rows.row_dlogits_(logits, None, head.targets, options, plain, stats, grads)
    assert out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    expected = logit_rows.row_dlogits_(
        exact, None, head.targets, TokenStatsOptions(torch.float32, entropy=True), plain, stats, grads
    )
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-30)  # Triton's interpreter truncates


def random_grads(tokens: int) -> triton_head.RowGrads:
    generator = seeded(3)
    return triton_head.RowGrads(*(torch.randn(tokens, generator=generator) for _ in range(3)))


def test_two_runs_are_bitwise_equal() -> None:
    head = random_head(70, 500, 24, torch.bfloat16)
    first, second = (values_and_gradients(linear_token_stats, head, entropy=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
