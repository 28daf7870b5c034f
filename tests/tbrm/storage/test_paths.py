"""Paths mean what they would in a shell, wherever they are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tbrm.config.model import ModelConfig
from tbrm.config.recipe import load_config
from tbrm.config.section import ConfigError
from tbrm.policy.load import load_model
from tbrm.storage.paths import expand, is_path
from tests.tbrm.conftest import TINY

OF_CONFIG = ["run.dir", "model.name", "data.trajectories", "rollout.vllm.weights_dir"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "~/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.mark.parametrize("key", OF_CONFIG)
def test_every_key_that_is_a_path_knows_homes_and_variables(key: str, home: Path) -> None:
    for written in ("~/x", "$HOME/x", "${HOME}/x"):
        config = load_config(TINY, [f"{key}={written}"])
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        assert value == f"{home}/x"
    with pytest.raises(ConfigError, match=rf"{key}: '\$NOWHERE/x' names the environment variable 'NOWHERE'"):
        load_config(TINY, [f"{key}=$NOWHERE/x"])


def test_so_do_a_recipe_itself_its_lists_and_its_task(home: Path) -> None:
    rows = [{"prompt": "1 + 1", "answer": "2"}]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "recipe.yaml").write_text(
        TINY.read_text().split("task:")[0].replace("runs/tiny", "$SCRATCH/run")
        + "task: {name: file, path: ~/rows.jsonl, heldout_path: $HOME/rows.jsonl, verifier: exact}\n"
        + "objective: {name: tbrm, beta: 0.1}\ntrainer: {steps: 1}\n"
        + "replay: {capacity: 9, samples_per_step: 1, files: [~/a*.jsonl]}\n"
    )
    config = load_config(home / "recipe.yaml")
    assert config.run.dir == f"{home}/scratch/run"
    assert config.replay.files == [f"{home}/a*.jsonl"]
    assert (config.task.path, config.task.heldout_path) == (f"{home}/rows.jsonl",) * 2
    with pytest.raises(ConfigError, match=r"replay.files.0: .* 'NOWHERE', which is not set"):
        load_config(home / "recipe.yaml", ["replay.files=[$NOWHERE/a.jsonl]"])


def test_a_home_that_is_nobodys_is_no_folder_called_so() -> None:
    with pytest.raises(ValueError, match="there is no home of '~nobody-here'"):
        expand("~nobody-here/run")
    assert expand("./~nobody-here/run") == "./~nobody-here/run"


def test_what_means_a_folder_asks_no_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "models").mkdir()
    (home / "model.gguf").write_text("")
    for name in ("./x", "../x", "/x", "a/b/c", "runs/x", "models/x", "model.gguf", "models"):
        assert is_path(name)
    for name in ("gpt2", "owner/name", "tiny"):
        assert not is_path(name)
    with pytest.raises(ValueError, match=rf"model.name: 'models/x' is not there; wants a folder .* start at {home}\)"):
        load_model(ModelConfig(name="models/x"), seed=0)
    with pytest.raises(ValueError, match=r"'model.gguf' is a file; wants a folder .* `tbrm import-gguf FILE OUT`"):
        load_model(ModelConfig(name="model.gguf"), seed=0)
