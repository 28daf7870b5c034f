"""What a newcomer runs first learns its task, and keeps the rules that the documentation gives."""

from __future__ import annotations

from pathlib import Path

import pytest

import tbrm
from tbrm.reporting.metrics import read_jsonl
from tests.tbrm.conftest import RECIPES


def test_the_first_recipe_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of it, which tells a recipe that learns from one that does not."""
    shorter = [f"run.dir={tmp_path}", "trainer.steps=40", "evaluation.every=0"]
    result = tbrm.train(tbrm.load_config(RECIPES / "tiny.yaml", shorter))
    assert result["accuracy_before"] <= 0.05
    assert result["accuracy_after"] >= 0.3
    assert "R/beta" not in capsys.readouterr().out
    first, *_, last = read_jsonl(tmp_path / "metrics.jsonl")
    assert first["residual_mean"] < 0  # the mean of R/beta begins above V(s_1)
    assert last["reward_mean"] > first["reward_mean"]
