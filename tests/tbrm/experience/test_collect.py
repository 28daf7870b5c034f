"""What a rollout keeps: problems whose responses all have one reward are drawn anew, as often as the recipe says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tbrm.config.rollout import RolloutConfig
from tbrm.config.section import ConfigError
from tbrm.experience.collect import Collected, RolloutSource
from tbrm.policy.tiny import tiny_model, tiny_tokenizer
from tbrm.reporting.metrics import Phases
from tbrm.rollout.interface import Request, Response
from tbrm.tasks import Grade, Problem, ProblemStream, Task
from tests.tbrm.conftest import chat_of, tiny_config


class Thirds(Task):
    """A third of the problems tells responses apart."""

    name: str = "thirds"

    def problem(self, index: int, seed: int) -> Problem:
        return Problem(f"{index}", answer="apart" if index % 3 == 0 else "alike")

    def heldout(self, count: int) -> list[Problem]:
        return []

    def grade(self, problems, responses) -> list[Grade]:
        return [
            Grade(float(response) if problem.answer == "apart" else 1.0, correct=True)
            for problem, response in zip(problems, responses, strict=True)
        ]


class Counting:
    """Answers 0, 1, ... to each prompt."""

    def __init__(self) -> None:
        self.asked: list[list[Request]] = []
        self.digits = tiny_tokenizer()("0123", add_special_tokens=False)["input_ids"]

    def update_weights(self, version: int) -> dict[str, float]:
        return {}

    def generate(self, requests, sampling, watch) -> list[list[Response]]:
        self.asked.append(list(requests))
        return [[Response([self.digits[n]], truncated=False) for n in range(request.samples)] for request in requests]

    def close(self) -> None:
        pass


def collect(refill: int) -> tuple[Collected, Counting, int]:
    engine, task = Counting(), Thirds()
    stream = ProblemStream(task, 0, [])
    chat = chat_of(tiny_model(len(tiny_tokenizer()), seed=0))
    config = RolloutConfig(prompts=6, samples=2, refill=refill)
    source = RolloutSource(stream, engine, chat, config, seed=0)
    return source.collect(1, Phases(torch.device("cpu"))), engine, source.position


def test_problems_without_a_difference_make_room_for_further_ones() -> None:
    plain, first, _ = collect(0)
    assert len(plain.trajectories) == 12
    assert "groups_alike" not in plain.metrics

    whole, engine, position = collect(20)
    assert engine.asked[0] == first.asked[0]  # the first draw is the same
    assert [len(asked) for asked in engine.asked[1:3]] == [4, 2]  # as many as are missing
    assert len({request.seed for asked in engine.asked for request in asked}) == position
    assert len(whole.trajectories) == len(whole.problems) == 12
    assert len({t.group for t in whole.trajectories}) == 6
    assert {problem.answer for problem in whole.problems} == {"apart"}
    assert [t.reward for t in whole.trajectories] == [0.0, 1.0] * 6
    assert whole.metrics["groups_alike"] == position - 6
    assert whole.metrics["generated_responses"] == whole.metrics["generated_tokens"] == 2 * position
    assert whole.metrics["dropped"] == 0


def test_a_rollout_is_refilled_no_more_often_than_the_recipe_says() -> None:
    some, engine, position = collect(1)
    assert [len(asked) for asked in engine.asked] == [6, 4]
    assert position == 10
    assert len({t.group for t in some.trajectories}) == 6 + 4 - some.metrics["groups_alike"] < 6


def test_refilling_without_several_responses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.refill is 2 but rollout.samples is 1"):
        tiny_config(tmp_path, rollout__refill=2, rollout__samples=1)
