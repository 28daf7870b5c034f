"""What a run goes on with, and what it refuses to."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tbrm.commands.cli import main
from tbrm.config.recipe import _RETIRED, config_to_dict, describe
from tbrm.config.section import ConfigError
from tbrm.policy.tiny import tiny_model, tiny_tokenizer
from tbrm.reporting.metrics import read_jsonl
from tbrm.training.resume import HISTORY, MAY_CHANGE, differences, may_change, nothing_left
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config, tiny_tree
from tests.tbrm.training.runs import REPLAY, assert_same_run


def save_model(folder: Path, seed: int) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a model and a task from files."""
    folder = tmp_path_factory.mktemp("resume")
    save_model(folder / "model", seed=0)
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(9)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Trainer(tiny_config(folder / "run", **of(folder))).train()
    return folder


def of(folder: Path, **settings: Any) -> dict[str, Any]:
    path = str(folder / "problems.jsonl")
    task = {"name": "file", "path": path, "heldout_rows": 4, "verifier": "last_number"}
    shape = {"checkpoint": {"every": 1, "keep": 9}, "evaluation": {"prompts": 2}, "trainer__steps": 2}
    return {**shape, "model__name": str(folder / "model"), "task": task, **settings}


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it: run.dir may change."""
    return shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)


def back_to(run: Path, step: int) -> None:
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to(f"step-{step:06d}")


def contents(run: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def recipe(tmp_path: Path, run: Path, **settings: Any) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(run, **settings)))
    return str(path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model__name": "tiny"}, r"model\.name was '.*model' and is now 'tiny'"),
        ({"seed": 7}, r"seed was 0 and is now 7"),
        ({"objective__beta": 0.5}, r"objective\.beta was 0\.002 and is now 0\.5"),
        ({"objective": {"name": "reval", "beta": 0.002}}, r"objective\.name was 'tbrm' and is now 'reval'\. "),
        (
            {"task": {"name": "reasoning_gym", "family": "gcd"}},
            r"task\.name was 'file' and is now 'reasoning_gym'\. ",
        ),
        ({"optim__betas": [0.9, 0.99]}, r"optim\.betas was \[0\.9, 0\.95\] and is now \[0\.9, 0\.99\]"),
        ({"rollout__samples": 3, "seed": 1}, r"seed was 0 .*; rollout\.samples was 2 and is now 3"),
        ({"evaluation__prompts": 3}, r"evaluation\.prompts was 2 and is now 3"),
    ],
)
def test_another_recipe_is_refused_by_the_keys_that_differ(
    finished: Path, run: Path, changed: dict[str, Any], said: str
) -> None:
    config = tiny_config(run, **{**of(finished), **changed, "trainer__steps": 3})
    with pytest.raises(ConfigError, match=rf"run\.dir: '.*' holds a run of another recipe: {said}.*--resume-anyway"):
        nothing_left(config, anyway=False)
    assert nothing_left(config, anyway=True) is None


def test_what_a_run_is_computed_with_and_how_long_it_goes_on_may_change(finished: Path, run: Path) -> None:
    changed = {
        "trainer": {"steps": 9, "batch_tokens": 99},
        "optim": {"learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 1},
        "evaluation": {"prompts": 2, "every": 1},
        "checkpoint": {"every": 3},
        "parallel": {"timeout": 60},
        "rollout__timeout": 60,
    }
    assert nothing_left(tiny_config(run, **of(finished, **changed)), anyway=False) is None


def test_every_pattern_of_keys_that_may_change_is_of_a_key(tmp_path: Path) -> None:
    keys = [*(key for key, _, _ in describe()), *_RETIRED]
    for pattern in MAY_CHANGE:
        name = pattern.strip("*")
        assert any(name in key for key in keys), pattern
    assert not [
        key for key in keys if key.startswith(("seed", "lora", "task", "objective", "replay")) and may_change(key)
    ]


def test_a_finished_run_says_so_and_nothing_of_it_is_written_again(
    finished: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    again = recipe(tmp_path, run, **of(finished, optim__learning_rate=1e-5))
    assert main(["train", again, "--resume"]) == 0
    assert f"{run} is finished: 2 of 2 steps are done" in capsys.readouterr().out
    assert contents(run) == before
    assert main(["train", again, "--resume", "seed=4"]) == 1
    assert "seed was 0 and is now 4" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.parametrize("links", ["lost", "leading nowhere"])
def test_where_latest_leads_nowhere_the_newest_checkpoint_is_gone_on_from(
    finished: Path, run: Path, tmp_path: Path, links: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = run / "checkpoints"
    for link in ("best", "latest"):
        (checkpoints / link).unlink(missing_ok=True)
    longer = recipe(tmp_path, run, **of(finished, trainer__steps=3))
    if links == "lost":
        assert main(["train", longer, "--resume", "trainer.steps=2"]) == 0
        assert "is finished: 2 of 2 steps are done" in capsys.readouterr().out
    else:
        (checkpoints / "latest").symlink_to("step-000003")
    assert main(["train", longer, "--resume"]) == 0
    assert "goes on after step 2 of 3" in capsys.readouterr().out
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3]
    assert (checkpoints / "latest").resolve() == checkpoints.resolve() / "step-000003"


def test_what_was_changed_is_kept_beside_the_recipe(
    finished: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back_to(run, 1)
    file = recipe(tmp_path, run, **of(finished))
    assert main(["train", file, "--resume", "--resume-anyway", "objective.beta=0.5", "checkpoint.keep=3"]) == 0
    [row] = read_jsonl(run / HISTORY)
    run_dir = [str(finished / "run"), str(run)]
    assert row["changed"] == {"run.dir": run_dir, "objective.beta": [0.002, 0.5], "checkpoint.keep": [9, 3]}
    assert row["step"] == 1
    assert row["time"].endswith("+00:00")
    assert yaml.safe_load((run / "config.yaml").read_text())["objective"]["beta"] == 0.5
    assert main(["train", file, "--resume", "objective.beta=0.5", "checkpoint.keep=3", "trainer.steps=3"]) == 0
    assert [row["changed"] for row in read_jsonl(run / HISTORY)][1:] == [{"trainer.steps": [2, 3]}]
    assert main(["train", file, "--resume-anyway", "--overwrite"]) == 1
    assert "give one of them" in capsys.readouterr().err


def test_a_longer_run_that_is_stopped_does_not_have_the_shorter_ones_result(finished: Path, run: Path) -> None:
    trainer = Trainer(tiny_config(run, **of(finished, trainer__steps=4)), resume=True)
    real = trainer.train_step

    def stops_in_step_4() -> dict[str, float]:
        if trainer.state.step == 3:
            raise KeyboardInterrupt
        return real()

    trainer.train_step = stops_in_step_4  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (run / "result.json").exists()
    Trainer(tiny_config(run, **of(finished, trainer__steps=4)), resume=True).train()
    assert json.loads((run / "result.json").read_text())["steps"] == 4


def test_a_recipe_of_an_earlier_version_had_the_defaults_and_what_it_had_more_is_named(
    finished: Path, run: Path
) -> None:
    path = run / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["replay"], tree["optim"]["eps"], tree["rollout"]["updates"], tree["task"]["system"]
    path.write_text(yaml.safe_dump(tree))
    longer = of(finished, trainer__steps=3)
    assert nothing_left(tiny_config(run, **longer), anyway=False) is None
    with pytest.raises(ConfigError, match=r"recipe: rollout\.updates was 1 and is now 2\. Go on"):
        nothing_left(tiny_config(run, **longer, rollout__updates=2), anyway=False)
    tree["optim"]["momentum"] = 0.3
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"recipe: optim\.momentum was 0\.3 and is now '\(no such key\)'"):
        nothing_left(tiny_config(run, **longer), anyway=False)
    path.unlink()
    with pytest.raises(ConfigError, match=r"no config\.yaml that can be read"):
        nothing_left(tiny_config(run, **longer), anyway=False)


def test_a_folder_without_a_run_has_nothing_to_compare(tmp_path: Path) -> None:
    assert nothing_left(tiny_config(tmp_path / "none"), anyway=False) is None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_dict(tiny_config(tmp_path, seed=1))))
    (tmp_path / "metrics.jsonl").touch()  # it ended before its first step
    assert nothing_left(tiny_config(tmp_path), anyway=False) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # a step that --resume would run again
    with pytest.raises(ConfigError, match="seed was 1"):
        nothing_left(tiny_config(tmp_path), anyway=False)


def test_a_recipe_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **REPLAY, optim={"learning_rate": 1e-16, "betas": [0.9, 0.999]})
    assert differences(yaml.safe_load(yaml.safe_dump(config_to_dict(config))), config) == {}


@pytest.mark.parametrize("what", ["weights", "template", "problems", "precision"])
def test_other_things_under_the_same_names_are_refused(finished: Path, run: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(finished / "model", tmp_path / "model")
    shutil.copy(finished / "problems.jsonl", tmp_path)
    settings = of(tmp_path, trainer__steps=3)
    if what == "weights":
        save_model(tmp_path / "model", seed=9)
        said = "model.name/model.safetensors is not the file that it was"
    elif what == "template":
        (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        said = "model.name/chat_template.jinja is not the file that it was"
    elif what == "problems":
        with (tmp_path / "problems.jsonl").open("a") as file:
            file.write('{"prompt": "0 + 1", "answer": "1"}\n')
        said = "task.path is not the file that it was"
    else:
        settings["model__precision"] = "bfloat16"
        said = r"model.precision was float32 and is bfloat16 here \(set it to float32\)"
    with pytest.raises(ConfigError, match=f"began with something else: {said}\\. "):
        Trainer(tiny_config(run, **settings), resume=True)
    reference = Trainer(tiny_config(run, **settings), resume=True, anyway=True).reference
    assert reference.version == (what != "problems"), "scores of another reference are not used"


def recorded(path: Path) -> None:
    rng = random.Random(0)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(5, 97) for _ in range(rng.randrange(1, most))]

    prompts = [[1, 2, *tokens(12)] for _ in range(12) for _ in range(3)]
    rows = [{"prompt_ids": prompts[i - i % 3], "response_ids": tokens(40), "reward": rng.random()} for i in range(36)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("updates", [1, 2])
def test_recorded_trajectories_past_an_epoch_resume_to_the_same_numbers(tmp_path: Path, updates: int) -> None:
    """Of later epochs the reference's scores are those of earlier ones, packed as those were."""
    recorded(tmp_path / "recorded.jsonl")
    settings = {
        "data": {"trajectories": str(tmp_path / "recorded.jsonl")},
        "rollout": {"prompts": 8, "samples": 3, "updates": updates},
        "trainer": {"steps": 6 * updates, "batch_tokens": 150},
        "evaluation": {"prompts": 0},
        "checkpoint": {"every": 1, "keep": 99},
        "objective": {"name": "tbrm", "beta": 0.1, "reset_reference_every": 4 * updates},
    }
    Trainer(tiny_config(tmp_path / "whole", **settings)).train()
    for step in (3 * updates, 5 * updates - 1):
        run = shutil.copytree(tmp_path / "whole", tmp_path / f"from-{step}", symlinks=True)
        back_to(run, step)
        Trainer(tiny_config(run, **settings), resume=True).train()
        assert_same_run(tmp_path / "whole", run)
