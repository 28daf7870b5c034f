"""flash-attn and torch's copy of it run on NVIDIA GPUs alone (test_gpu_attention.py). Here their place is taken by what they
are documented to compute, in plain torch, to which our side of the call is held: which queries and keys make a sequence, the
window, the soft-cap, the scale. And which attention is chosen where."""

from __future__ import annotations

import copy
import importlib.util
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tbrm.config.model import ModelConfig
from tbrm.config.section import ConfigError
from tbrm.policy.attention_choice import choose_attention
from tbrm.policy.flash_attention import FLASH_ATTENTION, VARLEN_ATTENTION, Paths
from tbrm.policy.model import PolicyModel
from tbrm.trajectories.packing import pack
from tbrm.trajectories.trajectory import Trajectory
from tests.tbrm.conftest import ARCHITECTURES, make_lm
from tests.tbrm.policy.test_model import trajectories, with_and_without_system_prompt


def documented(
    q: Tensor,  # [T, heads, width]
    k: Tensor,  # [K, kv_heads, width]
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
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k))
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    assert q.dtype == k.dtype == v.dtype
    left, right = window_size[0], 0 if causal else window_size[1]
    assert right == 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * (softmax_scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # How many keys lie before a query's own place, both counted from the ends of the sequence.
        behind = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        seen = (behind >= 0) & ((behind <= left) | (left < 0))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[k0:k1]))
    return torch.cat(outputs)


Window = tuple[int, int]


def torch_2_11(*tensors_and_lengths: Any, scale: float | None = None, window_size: Window = (-1, -1)) -> Tensor:
    return documented(*tensors_and_lengths, softmax_scale=scale, window_size=window_size)


def torch_2_12(
    q: Tensor,
    k: Tensor,
    *rest: Any,
    scale: float | None = None,
    window_size: Window = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    assert enable_gqa or q.shape[1] == k.shape[1]
    return documented(q, k, *rest, softmax_scale=scale, window_size=window_size)


def stand_in(kernel: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the attention that now calls it."""
    if kernel == "flash-attn":
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=documented))  # type: ignore[arg-type]
        return FLASH_ATTENTION
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_2_11 if kernel == "torch 2.11" else torch_2_12)
    return VARLEN_ATTENTION


# torch's does not soft-cap.
KERNELS = [("flash-attn", architecture) for architecture in ARCHITECTURES] + [
    (kernel, architecture)
    for kernel in ("torch 2.11", "torch 2.12")
    for architecture in ("qwen2", "gemma3", "gpt-neox", "deepseek-v3")
]


@with_and_without_system_prompt
@pytest.mark.parametrize(("kernel", "architecture"), KERNELS)
def test_stats_and_gradients_are_those_of_the_other_attention(
    kernel: str, architecture: str, system: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stand_in(kernel, monkeypatch)
    batch = pack(trajectories(system))
    found: list[list[Tensor]] = []
    for options in ({}, {"attention": name}):
        policy = PolicyModel(make_lm(architecture, tied=True), **options)  # type: ignore[arg-type]
        stats = policy(batch)
        (stats.logprobs.sum() + stats.lse.sum()).backward()
        found.append([stats.logprobs, stats.lse, *(p.grad for p in policy.parameters() if p.grad is not None)])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-6


# DeepSeek-V3 rotates in float32 and has keys wider than values.
@pytest.mark.parametrize("architecture", ["qwen3", "deepseek-v3"])
@pytest.mark.parametrize("kernel", ["flash-attn", "torch 2.11"])
def test_kernels_get_one_type_and_one_width_under_autocast(
    kernel: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stand_in(kernel, monkeypatch)
    policy = PolicyModel(make_lm(architecture, tied=True), attention=name, precision=torch.bfloat16)
    exact = PolicyModel(make_lm(architecture, tied=True))(pack(trajectories())).logprobs
    rounded = policy(pack(trajectories())).logprobs  # the stand-in looks
    assert 0 < (rounded - exact).abs().median() < 0.02 * exact.abs().max()


def test_scores_are_not_left_uncapped() -> None:
    policy = PolicyModel(make_lm("gemma2", tied=True), attention=VARLEN_ATTENTION)
    with pytest.raises(ValueError, match="torch's varlen_attn does not soft-cap scores"):
        policy(pack(trajectories()))


def test_a_response_sees_its_prompt_and_no_other_response() -> None:
    batch = pack(trajectories())  # three responses to a prompt of 7, and two of their own
    paths = Paths.of(batch.inputs.segments, torch.device("cpu"))
    rows = [paths.key_rows[a:b].tolist() for a, b in pairwise(paths.cu_keys.tolist())]
    prompt = list(range(7))
    # Of the responses of 5, 1 and 9 tokens all but the last are fed, so the second has no row.
    assert rows[:3] == [prompt, [*prompt, *range(7, 11)], [*prompt, *range(11, 19)]]
    assert rows[3:] == [list(range(19, 25)), list(range(25, 32))]
    assert paths.cu_queries.tolist() == [0, 7, 11, 19, 25, 32]


def test_a_batch_that_shares_nothing_is_read_where_it_is() -> None:
    batch = pack([Trajectory([3, 4], [5, 6, 7], 0.0), Trajectory([8], [9, 10], 0.0)])
    paths = Paths.of(batch.inputs.segments, torch.device("cpu"))
    assert paths.key_rows is None
    assert paths.cu_keys.tolist() == paths.cu_queries.tolist() == [0, 4, 6]


GPU = {"device": "cuda", "precision": "bfloat16"}


def chosen(architecture: str = "qwen2", *, head_dim: int | None = None, **settings: Any) -> str:
    config = copy.deepcopy(ARCHITECTURES[architecture])
    if head_dim:
        config.head_dim = head_dim
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    return choose_attention(ModelConfig(name="tiny", **settings), lm)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What this machine has of the things that a GPU machine may have; to be taken away by the test."""
    has = {"flash_attn", "triton", "gcc", "flash in torch"}
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n: n in has or None if n in ("flash_attn", "triton") else found(n)
    )
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: "flash in torch" in has)
    monkeypatch.setattr("shutil.which", lambda program: program if program in has else None)
    monkeypatch.delenv("CC", raising=False)
    return has


def test_auto_takes_the_first_that_is_there_and_fits(here: set[str]) -> None:
    assert chosen(**GPU) == chosen("gemma2", **GPU) == "flash"
    here.remove("flash_attn")
    assert chosen(**GPU) == chosen("deepseek-v3", **GPU) == "varlen"
    assert chosen("gemma2", head_dim=256, **GPU) == "flex"  # it soft-caps its scores
    assert chosen("gemma2", head_dim=8, **GPU) == "sdpa"  # too narrow for Triton
    assert chosen("gemma3", head_dim=512, **GPU) == "sdpa"
    here.remove("flash in torch")
    assert chosen(head_dim=64, **GPU) == "flex"
    here.remove("gcc")
    assert chosen(head_dim=64, **GPU) == "sdpa"


@pytest.mark.usefixtures("here")
def test_other_devices_and_precisions_go_segment_by_segment() -> None:
    assert chosen(device="cpu", precision="bfloat16") == "sdpa"
    assert chosen(device="cuda", precision="float32") == "sdpa"
    assert chosen(attention="sdpa", **GPU) == "sdpa"
    assert chosen(attention="flex", head_dim=64, **GPU) == "flex"


@pytest.mark.parametrize(("architecture", "settings", "gone", "message"), [
    ("qwen2", {"device": "cpu", "attention": "flash"}, "", "flash; wants a GPU and bfloat16, and this is cpu"),
    ("qwen2", {"device": "cuda", "precision": "float32", "attention": "varlen"}, "", "varlen; .* this is cuda and float32"),
    ("qwen2", {**GPU, "attention": "flash"}, "flash_attn", "flash; .* not installed .pip install 'tbrm\\[gpu\\]'"),
    ("qwen2", {**GPU, "attention": "varlen"}, "flash in torch", "varlen; torch .* without flash-attention's kernels"),
    ("gemma2", {**GPU, "attention": "varlen"}, "", "varlen; Gemma2ForCausalLM soft-caps its scores"),
    ("qwen2", {**GPU, "attention": "flex"}, "", "flex; heads are 8 wide in Qwen2ForCausalLM, and must be 16 at least"),
    ("gemma3", {**GPU, "attention": "flex", "head_dim": 512}, "", "flex; heads are 512 wide .* may be 256: set it to auto"),
    ("qwen2", {**GPU, "attention": "flex"}, "triton", "flex; wants Triton"),
])  # fmt: skip
def test_one_that_cannot_be_is_refused(
    architecture: str, settings: dict[str, Any], gone: str, message: str, here: set[str]
) -> None:
    here.discard(gone)
    with pytest.raises(ConfigError, match=f"model.attention: {message}"):
        chosen(architecture, **settings)
