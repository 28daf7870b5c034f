"""A run that an earlier layout of the sources saved goes on as it did there.

`saved_run/` is `tbrm train recipes/tiny.yaml` (now tests/tbrm/recipes/tiny.yaml) of the commit before the rooms (0288421), two
steps of four trajectories to each of four prompts; `resumed.jsonl` are the metrics of the two steps that followed there, with
`trainer.steps=4 --resume`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tbrm.commands.cli import main
from tbrm.reporting.metrics import is_timing, read_jsonl
from tests.tbrm.training.runs import rows

SAVED = Path(__file__).with_name("saved_run")


def test_a_run_of_an_earlier_layout_resumes_with_the_figures_it_had_there(tmp_path: Path) -> None:
    run = shutil.copytree(SAVED, tmp_path / "run", symlinks=True)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["run"]["dir"] = str(run)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml"), "trainer.steps=4", "--resume"]) == 0
    for then, now in zip(read_jsonl(SAVED / "resumed.jsonl"), rows(run)[2:], strict=True):
        figures = {key: value for key, value in then.items() if not is_timing(key)}
        assert now.pop("trained_tokens") > 0  # which runs did not write down then
        assert now.pop("behaviour_gap_mean") < 1e-4 and now.pop("reward_std") >= 0  # nor these
        assert now.pop("generated_responses") > 0  # nor this
        assert now == pytest.approx(figures, rel=1e-4)  # another processor rounds otherwise
