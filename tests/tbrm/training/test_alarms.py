"""What goes wrong while a run trains is said once, with what to do, and nothing is said where all is well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tbrm.objectives import OBJECTIVES, Objective
from tbrm.reporting.facts import facts
from tbrm.reporting.metrics import read_jsonl
from tbrm.reporting.run_folder import read_run
from tbrm.training.alarms import STEPS, Alarms
from tbrm.training.run_writer import RunWriter
from tests.tbrm.conftest import tiny_config

WELL = {
    "trajectories": 32,
    "reward_mean": 0.3,
    "reward_std": 0.4,
    "value_mean": 47.0,
    "log_ratio_mean": 4.0,
    "entropy_mean": 0.5,
    "response_length_mean": 12.0,
    "truncated_share": 0.1,
    "behaviour_gap_mean": 0.01,
    "staleness_max": 0,
}
TBRM = OBJECTIVES("tbrm")(name="tbrm", beta=0.01, reward_offset=0.3)


def said(objective: Objective, then: dict[str, Any], steps: int = 30) -> list[tuple[int, str, str]]:
    """By a run whose first ten steps are well, and whose others are `then`: step, what, and the words."""
    alarms = Alarms(objective)
    return [
        (step, key.removeprefix("warning/"), text)
        for step in range(1, steps + 1)
        for key, text in alarms(step, WELL if step <= 10 else {**WELL, **then}).items()
    ]


@pytest.mark.parametrize(
    ("then", "what", "words"),
    [
        (
            {"value_mean": 5.0},
            "value",
            "V(s_1) is 5 and the mean of R/beta 60: they drift apart, from 13 at first to 55",
        ),
        ({"value_mean": 150.0}, "value", "V(s_1) is 150, was 47, and drifts away from the mean of R/beta, 60"),
        ({"log_ratio_mean": 40.0}, "kl", "responses are 40 nats from the reference"),
        ({"entropy_mean": 0.01}, "entropy", "the entropy has fallen from 0.5 to 0.01 nats"),
        (
            {"reward_mean": 0.0, "reward_std": 0.0},
            "rewards",
            "in each of the last 5 steps all rewards were alike (0 on",
        ),
        ({"truncated_share": 0.5}, "truncated", "50% of the responses are cut off"),
        ({"behaviour_gap_mean": 0.2}, "engine", "of the engine and of the trainer are 0.2 nats a token apart"),
    ],
)
def test_each_is_said_once_with_what_to_do(then: dict[str, Any], what: str, words: str) -> None:
    found = [(step, text) for step, name, text in said(TBRM, then) if name == what]
    [(step, text)] = found
    assert 10 < step <= 10 + STEPS and text.startswith(f"step {step}: ")
    if step == 10 + STEPS:
        assert words in text
    assert any(key in text for key in ("objective.", "rollout.")), "a key that would mend it"


def test_what_is_said_of_means_over_steps_says_them() -> None:
    """Where it takes all five steps to be seen, the numbers are theirs."""
    [(step, name, text)] = said(TBRM, {"value_mean": 36.0})
    assert (step, name) == (10 + STEPS, "value") and "V(s_1) is 36, was 47" in text
    [(step, name, text)] = said(TBRM, {"truncated_share": 0.36})
    assert (step, name) == (10 + STEPS, "truncated") and "36% of the responses" in text


@pytest.mark.parametrize(
    ("objective", "then"),
    [
        (TBRM, {}),
        (TBRM, {"value_mean": 90.0, "reward_mean": 0.8}),  # V follows what is reached
        (TBRM, {"entropy_mean": 0.01, "reward_mean": 0.9}),  # sure, and right
        (TBRM, {"log_ratio_mean": 40.0, "response_length_mean": 300.0}),  # a little a token
        (TBRM, {"behaviour_gap_mean": 0.3, "staleness_max": 4}),  # of older weights
        (TBRM, {"trajectories": 0}),
        (TBRM, {"value_mean": float("nan"), "log_ratio_mean": float("nan"), "entropy_mean": None}),
        (OBJECTIVES("tbrm")(name="tbrm", beta=0.01, value="learned"), {"value_mean": -900.0}),
    ],
)
def test_nothing_is_said_where_all_is_well(objective: Objective, then: dict[str, Any]) -> None:
    assert said(objective, then) == []


def test_numbers_that_auto_found_are_those_of_the_step() -> None:
    auto = OBJECTIVES("tbrm")(name="tbrm", beta="auto", reward_offset="auto")
    numbers = {"beta": 0.01, "reward_offset": 0.3}
    assert said(auto, {}, steps=0) == []
    alarms = Alarms(auto)
    for step in range(1, 11):
        assert alarms(step, WELL | numbers) == {}
    # Ten times beta with its offset is the same level.
    for step in range(11, 21):
        assert alarms(step, WELL | {"beta": 0.1, "reward_offset": 5.7}) == {}


def test_a_run_logs_it_goes_on_without_saying_it_again_and_reports_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, objective={"name": "reval", "beta": 0.01})
    row = {**WELL, "truncated_share": 0.9}
    with RunWriter(config, step=0, resumed=False) as out:
        for step in range(1, 7):
            out.step(step, row)
    with RunWriter(config, step=6, resumed=True) as out:
        for step in range(7, 14):
            out.step(step, row)
    assert capsys.readouterr().out.count("are cut off before their end: raise rollout.max_new_tokens") == 1
    warned = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "warning/truncated" in row]
    assert [row["step"] for row in warned] == [STEPS]
    assert facts(read_run(tmp_path))["Warnings"] == warned[0]["warning/truncated"] + "."
