"""Every causal language model of transformers: exact, or refused by name; and those that are read in rows learn."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
import transformers

from tbrm.config.section import ConfigError
from tbrm.policy.load import load_policy
from tbrm.policy.model import PolicyModel
from tbrm.policy.named_weights import trained_weights
from tbrm.policy.tiny import tiny_tokenizer
from tbrm.reporting.metrics import read_jsonl
from tbrm.rollout.interface import Sampling, make_requests
from tbrm.rollout.own_cache import OwnCacheEngine
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import chat_of, make_lm, tiny_config
from tests.tbrm.policy.every_model import CANNOT_BE_MADE, KINDS, PAGE, ROUNDED, alone, read, reason, tiny, trajectories

pytestmark = pytest.mark.slow
TABLE = {
    cells[0]: (cells[1], cells[2])
    for line in PAGE.read_text().splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 3 and cells[1] not in ("read as", "---")
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


def test_the_page_has_every_kind() -> None:
    """Of the transformers that it was written with."""
    assert f"transformers {transformers.__version__}" not in PAGE.read_text() or list(TABLE) == KINDS
    assert {kind for kind, (how, _) in TABLE.items() if how == "not tried"} == CANNOT_BE_MADE.keys()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CANNOT_BE_MADE])
def test_log_probs_and_values_are_the_models_own_or_it_is_refused(kind: str) -> None:
    how, why = TABLE.get(kind, ("", ""))
    if not how:  # a kind of another transformers than the page's
        with contextlib.suppress(ValueError):
            assert read(kind)[1] < 2e-5
        return
    if how != "refused":
        found, gap = read(kind)
        assert found == how
        assert gap < (0.01 if kind in ROUNDED else 2e-5)
        return
    with pytest.raises(ValueError, match=r"^model.name: \w+ is not supported: ") as error:
        read(kind)
    assert reason(error.value) == why


def folder_of(kind: str, folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tiny(kind, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_next", "gpt_oss", "phi3_longrope", "mamba2"])
def test_a_model_in_rows_learns(kind: str, tmp_path: Path) -> None:
    """From its own rollouts; of recorded trajectories the residual falls."""
    name = folder_of(kind, tmp_path / "model") if kind != "phi3_longrope" else longrope(tmp_path / "model")
    own = tiny_config(tmp_path / "own", model__name=str(name), trainer__steps=1)
    Trainer(own).train()
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text(
        "".join(
            f'{{"prompt_ids": {t.prompt_ids}, "response_ids": {t.response_ids}, "reward": {i % 2}}}\n'
            for i, t in enumerate(trajectories())
        )
    )
    config = tiny_config(
        tmp_path / "run",
        model__name=str(name),
        data__trajectories=str(recorded),
        rollout__prompts=6,
        rollout__samples=1,
        objective__beta=0.2,
        trainer__steps=20,
        evaluation={"prompts": 0},
    )
    Trainer(config).train()
    losses = [row["loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]


def longrope(folder: Path) -> Path:
    """As Phi-4-mini: other factors for sequences past the length that the model was first trained on, here 16."""
    tokenizer = tiny_tokenizer()
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    config = transformers.Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=16,
        pad_token_id=0,
        rope_parameters={**rope, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
    )
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_rope_of_a_length_stands_beside_its_like_alone(tmp_path: Path) -> None:
    policy, _ = load_policy(tiny_config(tmp_path, model__name=str(longrope(tmp_path / "model"))))
    items = trajectories()
    lengths = [len(t.prompt_ids) + len(t.response_ids) for t in items]
    dealt = [members for batches in policy.layout.split(items, 10_000, 2) for members in batches]
    assert sorted(i for members in dealt for i in members) == list(range(len(items)))
    assert all(len({lengths[i] > 16 for i in members}) <= 1 for members in dealt)
    for members in filter(None, dealt):
        batch = policy.layout.pack([items[i] for i in members])
        logprobs = policy(batch).logprobs
        policy.lm.set_attn_implementation(policy.plain_attention)
        expected = torch.cat([alone(policy.lm, items[i])[0] for i in members])
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


def test_a_packed_model_may_be_read_in_rows_and_has_the_same_gradient() -> None:
    gradients = []
    for rows in (None, lambda length: 0):
        policy = PolicyModel(make_lm("llama", tied=True), rows=rows)
        batch = policy.layout.pack(trajectories()[:4])
        stats = policy(batch)
        (stats.logprobs.square().sum() + stats.lse.sum()).backward()
        gradients.append({name: weight.grad for name, weight in trained_weights(policy).items()})
    packed, in_rows = gradients
    for name, gradient in packed.items():
        assert (gradient - in_rows[name]).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mamba", "gpt_oss", "lfm2"])
def test_what_is_generated_is_token_by_token_what_the_model_says(kind: str) -> None:
    """Greedy; and sampled responses carry the log-probs of the policy and do not depend on how many are written at once."""
    lm = tiny(kind, len(tiny_tokenizer()))
    policy = PolicyModel(lm, rows=lambda length: 0)
    chat = chat_of(lm)
    requests = make_requests([[1, 5], [1, 8, 9, 10, 11], [1, 5], [1, 6, 7]], 2)
    greedy = OwnCacheEngine(policy, chat, 3).generate(requests, Sampling(8, 0.0))
    for request, responses in zip(requests, greedy, strict=True):
        ids = list(request.prompt)
        with torch.no_grad():
            while len(ids) < len(request.prompt) + 8 and (ids == request.prompt or ids[-1] not in chat.ends.ids):
                ids.append(int(lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert [response.token_ids for response in responses] == [ids[len(request.prompt) :]] * 2
    sampled = [OwnCacheEngine(policy, chat, size).generate(requests, Sampling(8, 1.0)) for size in (1, 8)]
    assert [[r.token_ids for r in responses] for responses in sampled[0]] == [
        [r.token_ids for r in responses] for responses in sampled[1]
    ]
    assert len({tuple(response.token_ids) for responses in sampled[0] for response in responses}) > 4
    for request, responses in zip(requests, sampled[1], strict=True):
        for response in responses:
            ids = torch.tensor(request.prompt + response.token_ids)
            with torch.no_grad():
                logits = lm(input_ids=ids[None], use_cache=False).logits[0, len(request.prompt) - 1 : -1].float()
            expected = logits.log_softmax(-1).gather(1, ids[len(request.prompt) :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(response.logprobs), expected, atol=1e-4, rtol=0)


def test_layouts_that_cannot_be_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model.layout: packed, and Phi3ForCausalLM cannot be: its rope \(longrope\) depends"
    ):
        load_policy(tiny_config(tmp_path, model__name=str(longrope(tmp_path / "phi")), model__layout="packed"))
    with pytest.raises(ValueError, match=r"MambaForCausalLM is not supported: packed token log-probs differ"):
        load_policy(
            tiny_config(tmp_path, model__name=str(folder_of("mamba", tmp_path / "mamba")), model__layout="packed")
        )
