"""A rule for beta that a run breaks is said at its first step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import tbrm
from tbrm.objectives import OBJECTIVES
from tbrm.objectives.tbrm import Tbrm
from tbrm.registry import GIVEN
from tbrm.reporting.metrics import read_jsonl
from tbrm.training.level import level_warning
from tests.tbrm.conftest import tiny_config


def metrics(reward: float, value: float) -> dict[str, Any]:
    return {"trajectories": 8, "reward_mean": reward, "value_mean": value}


def test_both_numbers_are_said_and_what_would_mend_them() -> None:
    said = level_warning(Tbrm(beta=0.02, reward_offset=0.1), metrics(0.25, 47.0))
    assert said is not None
    assert "the mean of R/beta is 17.5, below that of V(s_1), 47:" in said
    offset, beta = (float(number) for number in re.findall(r"objective.(?:reward_offset|beta)=([\d.e-]+)", said))
    # Either, put into the recipe, brings it a little above, and then nothing is said.
    for mended in (Tbrm(beta=0.02, reward_offset=offset), Tbrm(beta=beta, reward_offset=0.1)):
        assert level_warning(mended, metrics(0.25, 47.0)) is None
        assert 47 < (0.25 + mended.reward_offset) / mended.beta < 1.3 * 47


@pytest.mark.parametrize(("reward", "value"), [(0.0, 4.6), (-1.0, 4.6), (-1.0, -2.0)])
def test_where_no_reward_is_above_zero_beta_cannot_help(reward: float, value: float) -> None:
    said = level_warning(Tbrm(beta=0.1), metrics(reward, value))
    assert said is not None and "objective.beta=" not in said
    offset = float(re.findall(r"reward_offset=([\d.e-]+)", said)[0])
    assert level_warning(Tbrm(beta=0.1, reward_offset=offset), metrics(reward, value)) is None


def test_nothing_is_said_where_all_is_well_or_nothing_known() -> None:
    assert level_warning(Tbrm(beta=0.01), metrics(0.5, 47.0)) is None
    assert level_warning(Tbrm(beta=0.1), {"trajectories": 0}) is None
    assert level_warning(Tbrm(beta=0.1), metrics(0.5, float("nan"))) is None


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES.builtin) - {GIVEN}))
def test_objectives_that_cancel_the_level_are_free_of_it(name: str) -> None:
    warned = level_warning(OBJECTIVES(name)(beta=0.1), metrics(0.0, 4.6)) is not None
    assert warned == (name in ("tbrm", "brm"))


def test_a_run_says_so_once_with_the_numbers_of_its_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"trainer__steps": 2, "evaluation": {"prompts": 0}}
    tbrm.train(tiny_config(tmp_path / "low", objective={"name": "tbrm", "beta": 100.0}, **settings))
    said = capsys.readouterr().out
    [mean, value] = re.findall(r"step 1: the mean of R/beta is (\S+), below that of V\(s_1\), (\S+):", said)[0]
    first, _ = read_jsonl(tmp_path / "low" / "metrics.jsonl")
    assert float(mean) == pytest.approx(first["reward_mean"] / 100, rel=0.01)
    assert float(value) == pytest.approx(first["value_mean"], rel=0.01)
    assert said.count("R/beta") == 1
    objective = {"name": "tbrm", "beta": 100.0, "reward_offset": 600.0}
    tbrm.train(tiny_config(tmp_path / "high", objective=objective, **settings))
    assert "R/beta" not in capsys.readouterr().out
