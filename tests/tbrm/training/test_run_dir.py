"""What a run finds in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import tbrm
from tbrm.config.section import ConfigError
from tbrm.training.run_dir import prepare_run_dir, refuse_another_run
from tests.tbrm.conftest import tiny_config
from tests.tbrm.training.runs import assert_same_run


class Fails(tbrm.Callback):
    """After the first evaluation, before the first step."""

    def evaluation(self, step: int, result: object) -> None:
        raise OSError("no space left")


def test_a_run_that_died_before_its_first_step_does_not_stand_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path / "run", trainer__steps=1)
    with pytest.raises(OSError, match="no space left"):
        tbrm.train(config, callbacks=[Fails()])
    (tmp_path / "run" / "samples" / "step-000009.jsonl").write_text("of a longer run before it\n")
    (tmp_path / "run" / "mine.txt").write_text("a user's own")
    assert "begun anew" not in capsys.readouterr().err
    tbrm.train(config)
    assert f"{tmp_path / 'run'} held a run that had ended before its first step was done" in capsys.readouterr().err
    assert not (tmp_path / "run" / "samples" / "step-000009.jsonl").exists()
    assert (tmp_path / "run" / "mine.txt").exists()
    tbrm.train(tiny_config(tmp_path / "fresh", trainer__steps=1))
    assert_same_run(tmp_path / "run", tmp_path / "fresh")


@pytest.mark.parametrize("worth", ["metrics.jsonl", "checkpoints"])
def test_a_step_or_a_checkpoint_is_not_lost_unasked(worth: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' if worth == "metrics.jsonl" else "")
    if worth == "checkpoints":
        (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    for prepare in (
        lambda: prepare_run_dir(tmp_path, resume=False, overwrite=False),
        lambda: refuse_another_run(tmp_path),
    ):
        with pytest.raises(ConfigError, match=r"holds a run already; give --resume to go on"):
            prepare()
    assert (tmp_path / "metrics.jsonl").exists()


def test_a_folder_that_never_held_a_run_keeps_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a user's own")
    (tmp_path / "samples").mkdir()
    prepare_run_dir(tmp_path, resume=False, overwrite=False)
    assert (tmp_path / "config.yaml").exists() and (tmp_path / "samples").exists()
