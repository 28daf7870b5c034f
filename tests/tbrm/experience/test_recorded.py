"""Recorded trajectories that join the replay buffer while training goes on, through the trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.experience.record import record
from tbrm.reporting.metrics import Phases
from tbrm.tasks import Problem
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config
from tests.tbrm.training.runs import assert_same_run


def config_of(folder: Path, files: list[str], run: str = "run", **overrides: object) -> Config:
    replay = {"capacity": 100, "samples_per_step": 100, "files": files}
    return tiny_config(folder / run, replay=replay, **overrides)


def write(path: Path, *rows: dict, end: str = "\n") -> None:
    with path.open("a") as file:
        file.write("\n".join(map(json.dumps, rows)) + end)


def replayed(trainer: Trainer) -> list:
    """What the buffer holds of files."""
    return [t for t in trainer.replay.sample(10**6, Phases(trainer.device)) if t.weight_version is None]


def test_lines_join_as_they_are_written(tmp_path: Path) -> None:
    trainer = Trainer(config_of(tmp_path, [str(tmp_path / "*.jsonl")]))
    assert trainer.train_step()["recorded"] == 0
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write(one, {"prompt": "1", "response": "1", "reward": 1.0}, {"prompt": "1", "response": "2", "reward": 0.0})
    write(one, {"prompt": "5", "response": "6", "reward": 0.25}, end="")  # its newline is still to come
    metrics = trainer.train_step()
    assert (metrics["recorded"], metrics["trajectories"]) == (2, 8 + 8 + 2)
    assert metrics["staleness_max"] == 1  # theirs are not counted
    assert {(t.group, t.reward) for t in replayed(trainer)} == {(-1, 1.0), (-1, 0.0)}
    write(one, {"prompt": "1", "response": "3", "reward": 0.5}, end="\n")  # ends the line: two objects on it
    with pytest.raises(ValueError, match=r"one.jsonl:3: Extra data"):
        trainer.train_step()
    one.unlink()
    write(other, {"prompt": "1", "response": "9", "reward": 0.5})
    assert trainer.train_step()["recorded"] == 1
    assert sorted(t.group for t in replayed(trainer)) == [-2, -1, -1]
    other.write_text("")
    with pytest.raises(ValueError, match=r"other.jsonl is shorter than it was \(0 bytes"):
        trainer.train_step()


def test_held_out_prompts_are_left_out_and_missing_files_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "some.jsonl"
    with pytest.raises(ConfigError, match=r"replay.files: '.*some.jsonl' is not there"):
        Trainer(config_of(tmp_path, [str(path)]))
    held_out = tiny_config(tmp_path).task.heldout(5)[0]
    write(
        path, {"prompt": held_out.prompt, "response": "1", "reward": 1}, {"prompt": "1 1", "response": "1", "reward": 1}
    )
    trainer = Trainer(config_of(tmp_path, [str(path)]))
    assert trainer.train_step()["recorded"] == 1
    assert "replay.files: 1 of 2 left out" in capsys.readouterr().err


def test_lines_without_reward_are_graded_by_the_task(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    config = config_of(tmp_path, [str(path)])
    problem = config.task.problem(17, seed=5)
    row = {"prompt": problem.prompt, "answer": problem.answer, "entry": problem.entry}
    write(path, {**row, "response": problem.answer}, {**row, "response": "no idea"})
    trainer = Trainer(config)
    trainer.train_step()
    assert sorted(t.reward for t in replayed(trainer)) == [0.0, 1.0]
    write(path, {"prompt": "1", "response": "2"})
    with pytest.raises(ValueError, match=r"some.jsonl:3: answer: got None; wants text, to grade a line without reward"):
        trainer.train_step()
    write(path, {"prompt": "1", "response": "2", "answer": "2"})
    with pytest.raises(ValueError, match=r"some.jsonl:4: entry: holds no 'position', which task reasoning_gym grades"):
        trainer.train_step()


def test_rollouts_of_another_model_are_read_once_also_after_a_resume(tmp_path: Path) -> None:
    recorded = tmp_path / "recorded.jsonl"
    other = tiny_config(tmp_path / "other", seed=3)
    assert record(other, recorded, steps=2) == 16
    for row in map(json.loads, recorded.read_text().splitlines()):  # each can be graded anew
        [grade] = other.task.grade([Problem(tuple(row["messages"]), row["answer"], row["entry"])], [row["response"]])
        assert grade.reward == row["reward"]
    settings = {"trainer__steps": 4, "checkpoint": {"every": 2}, "rollout__max_staleness": 1}
    Trainer(config_of(tmp_path, [str(recorded)], **settings)).train()
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run", resumed, symlinks=True)
    (resumed / "checkpoints" / "latest").unlink()
    (resumed / "checkpoints" / "latest").symlink_to("step-000002")
    Trainer(config_of(tmp_path, [str(recorded)], run="resumed", **settings), resume=True).train()
    assert_same_run(tmp_path / "run", resumed)
