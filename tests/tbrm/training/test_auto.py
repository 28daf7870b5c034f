"""`auto` in an objective: what it comes to, that it is slow, and what it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tbrm.config.recipe import config_to_dict, parse_config
from tbrm.config.section import ConfigError
from tbrm.objectives import OBJECTIVES, Objective
from tbrm.training.auto import Auto
from tbrm.training.level import level_warning
from tests.tbrm.conftest import tiny_config, tiny_tree


def objective(name: str = "tbrm", **keys: object) -> Objective:
    return OBJECTIVES(name)(name=name, **{"beta": "auto", "reward_offset": "auto", **keys})


def test_the_mean_of_rewards_begins_a_little_above_the_value() -> None:
    numbers = Auto(objective(beta=0.02), {}).numbers([0.0, 0.0, 0.0, 1.0], [46.0, 48.0, 47.0, 47.0])
    assert (0.25 + numbers.reward_offset) / numbers.beta == pytest.approx(1.2 * 47)
    assert level_warning(numbers, {"trajectories": 4, "reward_mean": 0.25, "value_mean": 47.0}) is None


@pytest.mark.parametrize(("name", "keys"), [("reval", {}), ("tbrm", {"value": "learned"}), ("rloo", {})])
def test_an_objective_that_cancels_the_level_gets_no_offset(name: str, keys: dict[str, object]) -> None:
    auto = Auto(objective(name, **keys), {})
    assert not auto.wants_values
    assert auto.numbers([0.0, 1.0], []).reward_offset == 0


def test_beta_begins_at_a_hundredth_of_what_rewards_are_apart() -> None:
    found: dict[str, float] = {}
    auto = Auto(objective("reval"), found)
    assert auto.numbers([], []).beta > 0  # nothing to train on, and nobody knows
    assert auto.numbers([-5.0, -5.0], []).beta == pytest.approx(0.05)
    assert not found  # all alike: not yet
    assert auto.numbers([-5.0, 15.0], []).beta == pytest.approx(0.2)
    assert auto.numbers([-500.0, 0.0], []).beta == pytest.approx(0.2)


def test_beta_rises_slowly_beyond_the_target_and_falls_no_lower_than_it_was() -> None:
    found: dict[str, float] = {}
    auto, seen = Auto(objective("reval", kl_target=5.0), found), []
    for kl in (0.0, 5.0, 6.0, 500.0, 5.0, 2.5, -1.0, -1.0, -1.0):
        seen.append(auto.numbers([0.0, 1.0], []).beta)
        auto.look(kl)
    assert seen == pytest.approx([0.01, 0.01, 0.01, 0.0102, 0.01122, 0.01122, 0.010659, 0.01, 0.01])
    assert found["beta"] == found["least_beta"] == 0.01


def test_the_level_stays_where_beta_moves_and_all_is_gone_on_with() -> None:
    found: dict[str, float] = {}
    auto = Auto(objective(kl_target=1.0), found)
    first = auto.numbers([0.0, 1.0], [40.0, 40.0])
    for _ in range(8):
        auto.look(100.0)
    later = auto.numbers([1.0, 1.0], [])
    assert later.beta == pytest.approx(0.01 * 1.1**8)
    for numbers in (first, later):
        assert (0.5 + numbers.reward_offset) / numbers.beta == pytest.approx(48)
    resumed = Auto(objective(kl_target=1.0), dict(found)).numbers([1.0, 1.0], [99.0])
    assert (resumed.beta, resumed.reward_offset) == (later.beta, later.reward_offset)


def test_a_recipe_holds_the_word_and_takes_no_other(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, objective={"name": "tbrm", "beta": "auto", "reward_offset": "auto"})
    again = parse_config(config_to_dict(config))
    assert again.objective == config.objective and again.objective.beta == again.objective.reward_offset == "auto"
    for beta, wants in (("automatic", "valid number"), (0.0, "greater than 0")):
        with pytest.raises(ConfigError, match=rf"objective.beta: got {beta!r} .* wants: input should be .*{wants}"):
            parse_config(tiny_tree(tmp_path, objective={"name": "tbrm", "beta": beta}))
    with pytest.raises(ConfigError, match=r"objective.beta is auto but data.trajectories is set"):
        tiny_config(tmp_path, objective={"name": "tbrm", "beta": "auto"}, data__trajectories="some.jsonl")
