"""flash-attn runs on NVIDIA GPUs alone. Here its place is taken by what it is documented to compute, in plain torch, to which
our side of the call is held: which queries and keys make a sequence, the window, the soft-cap, the scale."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm.config.schema import ConfigError, ModelConfig
from tbrm.data import pack
from tbrm.policy.flash_attention import FLASH_ATTENTION, Paths
from tbrm.policy.model import PolicyModel
from tests.tbrm.conftest import ARCHITECTURES, make_lm
from tests.tbrm.test_model import trajectories, with_and_without_system_prompt


def documented(
    q: Tensor,  # [T, heads, head_dim]
    k: Tensor,  # [K, kv_heads, head_dim]
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * (softmax_scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # How many keys lie before a query's own place, both counted from the ends of the sequence.
        behind = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[k0:k1]))
    return torch.cat(outputs)


@with_and_without_system_prompt
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stats_and_gradients_are_those_of_the_other_attention(
    architecture: str, system: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=documented))  # type: ignore[arg-type]
    batch = pack(trajectories(system))
    found: list[list[Tensor]] = []
    for options in ({}, {"attention": FLASH_ATTENTION}):
        policy = PolicyModel(make_lm(architecture, tied=True), **options)  # type: ignore[arg-type]
        stats = policy(batch)
        (stats.logprobs.sum() + stats.lse.sum()).backward()
        found.append([stats.logprobs, stats.lse, *(p.grad for p in policy.parameters() if p.grad is not None)])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-6


def test_a_response_sees_its_prompt_and_no_other_response() -> None:
    batch = pack(trajectories())  # three responses to a prompt of 7, and two of their own
    paths = Paths.of(batch.segments, torch.device("cpu"))
    rows = [paths.key_rows[a:b].tolist() for a, b in pairwise(paths.cu_keys.tolist())]
    prompt = list(range(7))
    # Of the responses of 5, 1 and 9 tokens all but the last are fed, so the second has no row.
    assert rows[:3] == [prompt, [*prompt, *range(7, 11)], [*prompt, *range(11, 19)]]
    assert rows[3:] == [list(range(19, 25)), list(range(25, 32))]
    assert paths.cu_queries.tolist() == [0, 7, 11, 19, 25, 32]


@pytest.mark.parametrize(("settings", "message"), [
    ({"device": "cpu", "attention": "flash"}, "model.attention: flash; wants a GPU .* and bfloat16, and this is cpu"),
    ({"device": "cuda", "precision": "float32", "attention": "flash"}, "this is cuda and torch.float32"),
    ({"device": "cuda", "precision": "bfloat16", "attention": "flash"}, "wants flash-attn: pip install 'tbrm\\[gpu\\]'"),
])  # fmt: skip
def test_flash_where_it_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(name="tiny", **settings).resolve_attention()


def test_auto_takes_flash_where_it_is_installed_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**settings: Any) -> str:
        return ModelConfig(name="tiny", **settings).resolve_attention()

    on_gpu = {"device": "cuda", "precision": "bfloat16"}
    assert chosen(**on_gpu) == "sdpa"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert chosen(**on_gpu) == "flash"
    assert chosen(device="cpu", precision="bfloat16") == "sdpa"
    assert chosen(attention="sdpa", **on_gpu) == "sdpa"
