"""`tbrm.train`: objects where a recipe has names, and a folder that is treated as by the command."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import Field

import tbrm
from tbrm.commands.cli import main
from tbrm.config.section import ConfigError
from tbrm.objectives import TrajectoryLoss
from tbrm.objectives.tbrm import Tbrm
from tbrm.policy.load import find_model
from tbrm.policy.tiny import tiny_model, tiny_tokenizer
from tbrm.reporting.metrics import read_jsonl
from tbrm.rollout.evaluate import Evaluation
from tbrm.tasks import Grade, Problem
from tests.tbrm.conftest import tiny_tree
from tests.tbrm.training.runs import rows, weights


class Echo(tbrm.Task):
    """The task of this module: its config.yaml names it by its import path."""

    digits: int = 2

    def problem(self, index: int, seed: int) -> Problem:
        return self._of(index % 10**self.digits)

    def heldout(self, count: int) -> list[Problem]:
        return [self._of(10**self.digits + n) for n in range(count)]

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        marks = [float(text[:1] == problem.answer[0]) for problem, text in zip(problems, responses, strict=True)]
        return [Grade(mark, correct=mark == 1) for mark in marks]

    def _of(self, number: int) -> Problem:
        return Problem(f"{number}", f"{number}")


def shorter(completions: list[str], **_: Any) -> list[float]:
    return [1.0 / (1 + len(text)) for text in completions]


def tree(run: Path, **overrides: Any) -> dict[str, Any]:
    short = {"trainer__steps": 2, "rollout__max_new_tokens": 4, "evaluation": {"prompts": 4}}
    return tiny_tree(run, **{"task": {"name": f"{__name__}:Echo"}, **short, **overrides})


def of_file(folder: Path) -> dict[str, Any]:
    lines = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": "file", "path": str(folder / "data.jsonl"), "heldout_rows": 4, "verifier": "given"}


def given_model(**sections: Any) -> dict[str, Any]:
    return {"model": {"name": "given", "precision": "float32"}, **sections}


class Log(tbrm.Callback):
    def __init__(self, last: int = 99) -> None:
        self.calls: list[Any] = []
        self.last = last

    def start(self, trainer: tbrm.Trainer) -> None:
        self.calls.append(("start", trainer.state.step))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(("step", step, metrics["loss"]))

    def evaluation(self, step: int, result: Evaluation) -> None:
        self.calls.append(("evaluation", step, result.accuracy))

    def stop(self) -> bool:
        return len([call for call in self.calls if call[0] == "step"]) >= self.last


def test_a_task_that_is_an_object_trains_and_the_runs_recipe_is_read_again(tmp_path: Path) -> None:
    run, log = tmp_path / "run", Log()
    result = tbrm.train(tbrm.load_config(tree(run, task={"name": "given"})), task=Echo(digits=1), callbacks=[log])
    assert json.loads((run / "result.json").read_text()) == result
    config = tbrm.load_config(run / "config.yaml")
    assert config.task is not None
    assert dict(config.task) == {"name": f"{__name__}:Echo", "correct_at": 1.0, "digits": 1}
    # The command, the same function in Python and a second object all go on with the one run.
    assert main(["train", str(run / "config.yaml"), "trainer.steps=3", "--resume"]) == 0
    with pytest.raises(ConfigError, match=r"task.digits was 1 and is now 2"):
        tbrm.train(config, task=Echo(), resume=True)
    # What it told of itself is what it wrote down.
    losses = {row["step"]: row["loss"] for row in read_jsonl(run / "metrics.jsonl")}
    accuracies = {row["step"]: row["accuracy"] for row in read_jsonl(run / "eval.jsonl")}
    assert log.calls == [
        ("start", 0),
        ("evaluation", 0, accuracies[0]),
        ("step", 1, losses[1]),
        ("step", 2, losses[2]),
        ("evaluation", 2, accuracies[2]),
    ]


def test_a_second_run_from_python_is_refused_as_by_the_command(tmp_path: Path) -> None:
    config = tbrm.load_config(tree(tmp_path / "run", evaluation={"prompts": 0}))
    tbrm.train(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    said = (
        r"holds a run already; give --resume to go on with it, --overwrite to delete it \(of tbrm.train, resume=True or"
    )
    with pytest.raises(ConfigError, match=said):
        tbrm.train(config)
    with pytest.raises(ConfigError, match=said):
        tbrm.Trainer(config).train()
    assert tbrm.train(config, resume=True)["steps"] == 2  # is finished, and says so
    with pytest.raises(ConfigError, match="callbacks: got"):
        tbrm.train(config, overwrite=True, callbacks=[print])  # type: ignore[list-item]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="overwrite and resume: one deletes what the other goes on with"):
        tbrm.train(config, resume=True, overwrite=True)
    first = rows(tmp_path / "run")
    tbrm.train(config, overwrite=True)
    assert rows(tmp_path / "run") == first


def test_what_no_file_can_name_is_given_and_a_recipe_read_again_says_which_object(tmp_path: Path) -> None:
    class Local(Tbrm):
        scale: float = 1.0

        def __call__(self, stats: Any, batch: Any) -> TrajectoryLoss:
            return TrajectoryLoss(*(self.scale * part for part in super().__call__(stats, batch)))

    lm, tokenizer = tiny_model(len(tiny_tokenizer()), seed=5), tiny_tokenizer()
    reward = lambda completions, **_: shorter(completions)  # noqa: E731
    run = tmp_path / "run"
    objects: dict[str, Any] = {"objective": Local(beta=0.01, scale=2.0), "model": lm, "tokenizer": tokenizer}
    config = tbrm.load_config(tree(run, task=of_file(tmp_path), **given_model(), checkpoint={"every": 1}))
    tbrm.train(config, reward=reward, **objects)
    # Trained in place, and as a user has it: in its own attention.
    assert torch.equal(lm.state_dict()["model.norm.weight"], weights(run)["model.safetensors/model.norm.weight"])
    assert lm.config._attn_implementation == "sdpa" and lm.training

    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["objective"] == {**written["objective"], "name": "given", "beta": 0.01, "scale": 2.0}
    assert (written["model"]["name"], written["task"]["verifier"]) == ("given", "given")
    again = tbrm.load_config(run / "config.yaml", ["trainer.steps=3"])
    fresh = {**objects, "model": tiny_model(len(tokenizer), seed=5)}
    for missing, said in {
        "reward": r"task.verifier: given, .* give it, tbrm.train\(config, reward=FUNCTION\)",
        "objective": r"objective.name: given, .*objective=MyObjective",
        "model": r"model.name: given, .*model=MODULE, tokenizer=TOKENIZER",
    }.items():
        some = {name: thing for name, thing in {**fresh, "reward": reward}.items() if name != missing}
        with pytest.raises(ValueError, match=said):
            tbrm.train(again, resume=True, **some)
    with pytest.raises(ConfigError, match=r"began with something else: model.name/weights"):
        tbrm.train(again, resume=True, reward=reward, **objects)
    assert tbrm.train(again, resume=True, reward=reward, **fresh)["steps"] == 3
    assert find_model(str(run))[0].endswith(("step-000002", "step-000003"))


class Rows(Echo):
    """Its keys do not say it all."""

    digits: int = Field(1, exclude=True)


def test_a_task_of_no_module_is_named_when_it_is_wanted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tbrm.train(tbrm.load_config(tree(run, task={"name": "given"}, evaluation={"prompts": 0})), task=Rows(digits=2))
    assert yaml.safe_load((run / "config.yaml").read_text())["task"]["name"] == "given"
    with pytest.raises(
        ValueError, match=r"task.name: given, .* tbrm.train\(config, task=MyTask\(...\)\), or name a task"
    ):
        tbrm.train(tbrm.load_config(run / "config.yaml", ["trainer.steps=3"]), resume=True)
    assert tbrm.train(tbrm.load_config(run / "config.yaml", ["trainer.steps=3"]), task=Rows(digits=2), resume=True)


def test_a_function_of_a_module_is_written_as_its_import_path(tmp_path: Path) -> None:
    config = tbrm.load_config(tree(tmp_path / "run", task=of_file(tmp_path), evaluation={"prompts": 0}))
    tbrm.train(config, reward=shorter, callbacks=[last := Log(last=1)])
    assert [call[:2] for call in last.calls] == [("start", 0), ("step", 1)]  # stopped, though there were two steps
    again = tbrm.load_config(tmp_path / "run" / "config.yaml")
    assert again.task is not None and again.task.model_dump()["verifier"] == f"{__name__}:shorter"
    assert tbrm.train(again, resume=True)["steps"] == 2


@pytest.mark.parametrize(
    ("sections", "objects", "said"),
    [
        ({}, {"reward": shorter}, r"reward: a function was given, and task '.*Echo' has a grader of its own"),
        ({"task": {"verifier": "exact"}}, {"reward": shorter}, r"task.verifier is exact: set that to given, or leave"),
        ({"task": {}}, {"reward": 3}, r"reward: got 3; wants a function with the signature of TRL's"),
        ({"task": {}}, {"reward": lambda: []}, r"verifier: <lambda> cannot be called"),
        ({}, {"task": Echo}, r"task: got <class .*Echo'>; wants an instance of a subclass of tbrm.Task"),
        ({}, {"objective": "tba"}, r"objective: got 'tba'; wants an instance of a subclass of tbrm.Objective"),
        ({}, {"model": "lm", "tokenizer": "its"}, r"model.name: 'tiny', and a model was given, too: set model.name to"),
        (given_model(), {"model": torch.nn.Linear(2, 2)}, r"model: got a Linear; wants a transformers PreTrainedModel"),
        (given_model(), {"model": "lm"}, r"tokenizer: got None beside a model; wants its transformers tokenizer"),
        ({}, {"tokenizer": "its"}, r"tokenizer: given without a model; that of model.name comes with it"),
        (
            {},
            {"callbacks": [print]},
            r"callbacks: got <built-in function print>; wants instances of subclasses of tbrm.C",
        ),
        (given_model(lora={"rank": 2}), {}, r"lora.rank is set but model.name is 'given', which no adapter can name"),
    ],
)
def test_objects_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, sections: dict[str, Any], objects: dict[str, Any], said: str
) -> None:
    if "task" in sections:
        sections = {"task": of_file(tmp_path) | sections["task"]}
    things = {"lm": lambda: tiny_model(len(tiny_tokenizer()), seed=0), "its": tiny_tokenizer}
    objects = {k: things[v]() if isinstance(v, str) and v in things else v for k, v in objects.items()}
    with pytest.raises(ValueError, match=said):
        tbrm.train(tbrm.load_config(tree(tmp_path / "run", **sections)), **objects)


def test_a_run_in_a_thread_trains_the_same_and_no_other_thread_may_train_in_its_folder(tmp_path: Path) -> None:
    config = tbrm.load_config(tree(tmp_path / "run"))
    entered, refused = threading.Event(), []

    class Meanwhile(tbrm.Callback):
        def start(self, trainer: tbrm.Trainer) -> None:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            entered.set()

    def other() -> None:
        with pytest.raises(ConfigError, match="is being trained in by another thread of this process") as error:
            tbrm.train(config, resume=True)
        refused.append(error)

    thread = threading.Thread(target=tbrm.train, args=(config,), kwargs={"callbacks": [Meanwhile()]})
    thread.start()
    thread.join()
    assert entered.is_set() and refused
    tbrm.train(tbrm.load_config(tree(tmp_path / "main")))
    assert rows(tmp_path / "run") == rows(tmp_path / "main")
