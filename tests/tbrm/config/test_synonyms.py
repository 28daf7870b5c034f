"""What is suggested for a key that there is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tbrm.config.recipe import describe, parse_config
from tbrm.config.section import ConfigError
from tbrm.config.synonyms import SYNONYMS
from tbrm.tasks.file import FileTask


def test_every_synonym_leads_to_a_key() -> None:
    known = {key for key, _, _ in describe()} | {f"task.{key}" for key, _, _ in describe(FileTask)}
    assert set(SYNONYMS.values()) <= known


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optim.lr", "optim.learning_rate"),
        ("trainer.LR", "optim.learning_rate"),
        ("objective.kl_coef", "objective.beta"),
        ("rollout.num_generations", "rollout.samples"),
        ("rollout.max_completion_length", "rollout.max_new_tokens"),
        ("trainer.per_device_train_batch_size", "rollout.prompts"),
        ("task.reward_funcs", "task.verifier"),
        ("task.lr", "optim.learning_rate"),
        ("output_dir", "run.dir"),
        # No other's names, but nearly ours: in the section, in another one, and a section itself.
        ("rollout.sample", "rollout.samples"),
        ("trainer.learning_rat", "optim.learning_rate"),
        ("optimizer", "optim"),
        ("evaluaton", "evaluation"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_is_meant(key: str, meant: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    tree: dict[str, Any] = {
        "run": {"dir": "run"},
        "model": {"name": "tiny"},
        "task": {"name": "file", "path": str(tmp_path / "rows.jsonl"), "verifier": "exact"},
        "objective": {"name": "tbrm", "beta": 0.1},
        "trainer": {"steps": 1},
    }
    section, _, leaf = key.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[leaf] = 1
    with pytest.raises(ConfigError) as refused:
        parse_config(tree)
    assert str(refused.value) == f"{key}: unknown key (value 1); did you mean {meant}?"


def test_a_key_like_no_other_gets_them_all() -> None:
    with pytest.raises(ConfigError, match=r"xyzzy: unknown key \(value 1\); valid keys: run.dir, seed, model.name, "):
        parse_config({"run": {"dir": "x"}, "model": {"name": "tiny"}, "trainer": {"steps": 1}, "xyzzy": 1})
