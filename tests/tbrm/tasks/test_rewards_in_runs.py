"""Reward functions of users in a run: what is ungraded, raises, or cannot be called."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tbrm.commands.cli import main
from tbrm.reporting.metrics import read_jsonl
from tests.tbrm.conftest import tiny_tree


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    source = """
        def some(level, trainer_state, completion_ids, **_):
            assert trainer_state.max_steps == 2 and all(completion_ids)
            return [None if each % 2 else 1.0 for each in level]

        def none(level, **_):
            return [None] * len(level)

        def broken(level, **_):
            return [1 / (each - 3) for each in level]

        def strict(prompts, completions):
            return [1.0] * len(prompts)
    """
    (tmp_path / "reward_of_user.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": f"{i}", "answer": "0", "level": i} for i in range(4)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def write(function: str, **settings: Any) -> Path:
        task = {"name": "file", "path": str(tmp_path / "problems.jsonl"), "verifier": f"reward_of_user:{function}"}
        tree = tiny_tree(tmp_path / "run", evaluation={"prompts": 0}, trainer__steps=2, **settings) | {"task": task}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(tree))
        return path

    return write


def test_a_step_with_nothing_to_train_on_says_why(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe("none"))]) == 0
    said = "nothing to train on: of its responses 8 could not be graded, and 8 were left out in all"
    assert capsys.readouterr().out.count(said) == 2


def test_what_is_ungraded_is_left_out_of_the_loss_and_counted(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Four problems with two responses each, of which half have no reward."""
    assert main(["train", str(recipe("some"))]) == 0
    for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert (row["trajectories"], row["ungraded"], row["dropped"], row["reward_mean"]) == (4, 4, 4, 1.0)
    assert main(["train", str(recipe("some", rollout__ungraded="zero")), "--overwrite"]) == 0
    for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert (row["trajectories"], row["ungraded"], row["dropped"], row["reward_mean"]) == (8, 4, 0, 0.5)


def test_an_exception_is_shown_with_the_users_own_traceback(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe("broken"))]) == 1
    errors = capsys.readouterr().err
    assert "return [1 / (each - 3) for each in level]" in errors
    assert "trainer.py" not in errors
    assert (
        errors.strip()
        .splitlines()[-1]
        .startswith(
            "tbrm train: reward function reward_of_user:broken raised ZeroDivisionError('division by zero') on the response "
        )
    )
    assert errors.strip().endswith("to '3'")


def test_a_function_that_cannot_be_called_is_known_before_the_model_is_loaded(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe("strict"))
    assert main(["config", path]) == 1
    errors = capsys.readouterr().err
    assert "verifier: reward_of_user:strict cannot be called: got an unexpected keyword argument" in errors
    assert "Traceback" not in errors
    for arguments in (["--debug", "config", path], ["config", path, "--debug"]):
        assert main(arguments) == 1
        assert "Traceback" in capsys.readouterr().err
