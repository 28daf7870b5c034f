"""Texts that are longer than the model: known before it reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MambaConfig, OPTConfig, PreTrainedConfig

from tbrm.policy.positions import positions_of
from tbrm.rollout import embedded
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LlamaConfig(max_position_embeddings=256), 256),
        (LlamaConfig(max_position_embeddings=256, rope_parameters={"rope_type": "yarn", "factor": 4.0}), 1024),
        # Both state the positions of after the stretch.
        (
            LlamaConfig(
                max_position_embeddings=1024,
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
            ),
            1024,
        ),
        (
            LlamaConfig(
                max_position_embeddings=2048, rope_parameters={**LLAMA3, "original_max_position_embeddings": 256}
            ),
            2048,
        ),
        # One rope for each kind of layer.
        (
            Gemma3TextConfig(
                max_position_embeddings=256,
                rope_parameters={"full_attention": STRETCHED, "sliding_attention": {"rope_type": "default"}},
            ),
            2048,
        ),
        (GPT2Config(n_positions=100), 100),
        (OPTConfig(max_position_embeddings=100), 100),
        (MambaConfig(), None),
    ],
    ids=["plain", "yarn", "yarn-stated", "llama3", "gemma3", "gpt2", "opt", "mamba"],
)
def test_the_positions_of_a_model_are_those_of_its_config(config: PreTrainedConfig, positions: int | None) -> None:
    assert positions_of(config) == positions


@pytest.mark.parametrize("heldout", [0, 4])
def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_generated(
    tmp_path: Path, heldout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of held-out problems at the start, of others in their rollout."""

    def generates(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(embedded, "generation_mode", generates)
    config = tiny_config(tmp_path / "run", rollout__max_new_tokens=510, evaluation={"prompts": heldout})
    said = (
        r"rollout\.max_new_tokens: 510 tokens after a prompt of \d+ are more than the model's 512 positions "
        r"\(max_position_embeddings\); shorten either\. The prompt: '<\|user\|>"
    )
    with pytest.raises(ValueError, match=said):
        trainer = Trainer(config)
        assert not heldout, "known when the run begins"
        trainer.train_step()


def test_a_recorded_trajectory_longer_than_the_model_is_named_by_its_line(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [5] * 12, "response_ids": [6] * 500, "reward": 1.0} for _ in range(2)]
    rows[1]["response_ids"] = [6] * 501
    path = tmp_path / "recorded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"recorded\.jsonl:2: response: 501 tokens after a prompt of 12 are more than"):
        Trainer(tiny_config(tmp_path / "run", data__trajectories=str(path)))
