"""Terms that a plan has for some objectives alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tbrm.plan import make_plan, peaks
from tests.tbrm.conftest import tiny_config


@pytest.mark.parametrize("processes", [1, 2])
def test_a_critic_is_planned_with_its_weights_gradients_and_moments(tmp_path: Path, processes: int) -> None:
    alone, beside = (
        make_plan(tiny_config(tmp_path, objective={"name": name}, model__device="cpu"), processes)
        for name in ("grpo", "ppo")
    )
    assert beside.critic is not None
    held, more = (peaks(plan.terms())["update"] for plan in (alone, beside))
    elements = sum(-(-shape[0] // processes) * shape[1:].numel() for shape in beside.critic.shapes)
    logits = -(-beside.critic.vocab // processes) * beside.critic.width  # untied: there, and not trained
    assert more - held == 16 * elements - (0 if beside.critic.tied else 12 * logits)
