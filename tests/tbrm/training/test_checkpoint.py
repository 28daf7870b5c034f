"""What a run keeps, and goes on from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from tbrm.config.section import ConfigError
from tbrm.training.run_dir import prepare_run_dir
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config, tiny_tree
from tests.tbrm.training.runs import AHEAD, REPLAY, assert_same_run, rows

DIES = textwrap.dedent(
    """
    import os, signal, sys
    from tbrm.commands.cli import main
    from tbrm.objectives.tbrm import Tbrm
    calls = 0
    def deadly(real):
        def call(self, stats, batch):
            global calls
            calls += 1
            if calls == int(os.environ["DIE_AT_CALL"]):
                os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a step: rollouts done, gradient half made
            return real(self, stats, batch)
        return call
    Tbrm.__call__ = deadly(Tbrm.__call__)
    sys.exit(main(sys.argv[1:]))
    """
)


@pytest.mark.parametrize("extra", [{}, REPLAY, AHEAD], ids=["tbrm", "reval with replay", "rollouts ahead"])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path: Path, extra: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGKILL inside step 6, after the checkpoint of step 4; the resumed run must not differ in a single bit."""
    settings = {
        "trainer__steps": 8,
        "trainer__batch_tokens": 60,
        "checkpoint__every": 2,
        "evaluation__every": 3,
        **extra,
    }
    settings["evaluation"] = {"prompts": 5, "every": 3}
    Trainer(tiny_config(tmp_path / "whole", **settings)).train()

    # Micro-batches up to and including step 5, and one more.
    calls = _count_objective_calls(tiny_config(tmp_path / "counted", **settings), 5, monkeypatch) + 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_tree(tmp_path / "killed", **settings)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", DIES, "train", str(recipe)],
        env={**environment, "DIE_AT_CALL": str(calls)},
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "killed" / "checkpoints" / "latest").resolve().name == "step-000004"
    # What a kill can leave behind, besides: half a line and half a checkpoint.
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (tmp_path / "killed" / "checkpoints" / ".writing-step-000006").mkdir()

    subprocess.run(
        [sys.executable, "-m", "tbrm", "train", str(recipe), "--resume"], env=environment, check=True, timeout=120
    )
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".writing-*"))


def _count_objective_calls(config, steps: int, monkeypatch: pytest.MonkeyPatch) -> int:
    calls = []
    kind = type(config.objective)
    real = kind.__call__
    trainer = Trainer(config)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", lambda *args: calls.append(1) or real(*args))
        for _ in range(steps):
            trainer.train_step()
    trainer.supply.close()
    return len(calls)


def test_the_best_checkpoint_is_the_most_accurate_then_the_one_of_most_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_config(tmp_path, trainer__steps=5, evaluation={"prompts": 1, "every": 1}))
    found = iter([(0.5, 0.5), (0.5, 0.6), (0.5, 0.6), (0.4, 0.9), (0.6, 0.1), (0.5, 0.9)])
    saved = []
    monkeypatch.setattr(trainer, "_evaluate", lambda out: next(found))
    monkeypatch.setattr(trainer, "_save", lambda best: saved.append((trainer.state.step, best)))
    result = trainer.train()
    assert [step for step, best in saved if best] == [1, 4]
    assert (result["reward_before"], result["reward_after"]) == (0.5, 0.9)


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"holds a run already; give --resume .* --overwrite"):
        prepare_run_dir(tmp_path, resume=False, overwrite=False)
    prepare_run_dir(tmp_path, resume=True, overwrite=False)
    assert (tmp_path / "metrics.jsonl").exists()
    prepare_run_dir(tmp_path, resume=False, overwrite=True)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "mine.txt").exists()


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, trainer__steps=1, evaluation={"prompts": 0})
    Trainer(config).train()
    (tmp_path / "checkpoints" / "latest" / "trainer" / "state.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"step-000001 cannot be resumed: state.json: format 99, this version reads 3"):
        Trainer(config, resume=True)
