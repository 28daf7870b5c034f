"""What is found of an objective as it trains: the same however a step is dealt out, and gone on with bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tbrm.reporting.metrics import is_timing
from tbrm.tasks import Grade, Problem, Task
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config
from tests.tbrm.objectives.test_contract import record
from tests.tbrm.training.runs import assert_same_run, rows

LEARNED = {"name": "tbrm", "beta": 0.1, "value": "learned"}


@pytest.mark.parametrize("value", ["learned", "optimal"])
def test_a_value_is_the_same_whatever_the_micro_batches(tmp_path: Path, value: str) -> None:
    found = []
    for tokens in (4096, 40):
        trainer = Trainer(
            tiny_config(
                tmp_path / f"of {tokens}",
                objective=LEARNED | {"value": value},
                trainer__batch_tokens=tokens,
                data__trajectories=record(tmp_path / "recorded.jsonl", ["1", "1", "2", "2", "3", "3", "4", "4"]),
                evaluation={"prompts": 0},
            )
        )
        found.append([trainer.train_step() for _ in range(3)])
    for whole, parts in zip(*found, strict=True):
        figures = {key: each for key, each in whole.items() if not is_timing(key)}
        assert {key: parts[key] for key in figures} == pytest.approx(figures, rel=1e-4, abs=1e-4)
    assert found[0][-1]["loss"] < 0.3 * found[0][0]["loss"]
    assert ("learned_value_mean" in found[0][0]) == (value == "learned")


def test_a_learned_value_begins_as_the_optimal_one_and_then_tells_prompts_apart(tmp_path: Path) -> None:
    def steps(value: str) -> list[dict[str, float]]:
        recorded = record(tmp_path / "recorded.jsonl", ["1", "1", "2", "2", "3", "3", "4", "4"])
        objective = LEARNED | {"value": value}
        config = tiny_config(
            tmp_path / value, objective=objective, data__trajectories=recorded, evaluation={"prompts": 0}
        )
        trainer = Trainer(config)
        return [trainer.train_step() for _ in range(2)]

    (learned, then), (optimal, _) = steps("learned"), steps("optimal")
    for key in ("loss", "residual_mean", "grad_norm"):
        assert learned[key] == pytest.approx(optimal[key], rel=1e-4, abs=1e-5), key
    assert learned["learned_value_explains"] == pytest.approx(0, abs=1e-6)  # it is the mean itself
    assert then["learned_value_explains"] > 0.05


class Lengths(Task):
    """The tiny model is right about nothing; this it can be."""

    def problem(self, index: int, seed: int) -> Problem:
        return Problem(f"{index}", "")

    def heldout(self, count: int) -> list[Problem]:
        return []

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return [Grade(len(response) % 2, correct=False) for response in responses]


REPLAYED = {"replay": {"capacity": 12, "samples_per_step": 4}}


@pytest.mark.parametrize(
    ("objective", "replay"),
    [
        (LEARNED | {"beta": "auto", "kl_target": 0.01, "reset_reference_every": 3}, REPLAYED),
        ({"name": "tbrm", "beta": "auto", "kl_target": 0.01, "reward_offset": "auto"}, {}),
    ],
    ids=["a learned value and beta", "beta and offset"],
)
def test_what_was_found_goes_on_bit_for_bit_and_stands_apart_from_the_model(
    tmp_path: Path, objective: dict[str, Any], replay: dict[str, Any]
) -> None:
    settings = {
        "task": {"name": f"{__name__}:Lengths"},
        "objective": objective,
        **replay,
        "checkpoint__every": 2,
        "evaluation": {"prompts": 0},
    }
    Trainer(tiny_config(tmp_path / "whole", **settings)).train()
    Trainer(tiny_config(tmp_path / "parts", **settings, trainer__steps=2)).train()
    Trainer(tiny_config(tmp_path / "parts", **settings), resume=True).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    found = rows(tmp_path / "parts")
    assert len({row["beta"] for row in found}) > 1

    kept = tmp_path / "whole" / "checkpoints" / "latest"
    if not replay:
        first, level = found[0], 1.2 * found[0]["value_mean"]
        assert (first["reward_mean"] + first["reward_offset"]) / first["beta"] == pytest.approx(level, rel=1e-5)
        assert not (kept / "trainer" / "value").exists()
        return
    seen = load_file(kept / "trainer" / "value" / "seen.safetensors")
    assert set(seen["versions"].tolist()) == {1} and set(seen["steps"].tolist()) == {4}  # of the reference as it is
    policy = Trainer(tiny_config(tmp_path / "other")).policy.lm
    assert set(load_file(kept / "model.safetensors")) <= set(policy.state_dict())  # no more than the model's own
