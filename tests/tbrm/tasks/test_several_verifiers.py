"""Rewards of more than one kind: added up by weight, or by the verifier that a row names."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tbrm.tasks import Grade, Problem, Progress
from tbrm.tasks.file import FileTask
from tbrm.tasks.verifiers import Verifier, make_verifier, make_verifiers
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config
from tests.tbrm.training.runs import rows

DAPO = {"free_tokens": 10, "most_tokens": 20}


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    source = """
        def half(completions, **kwargs):
            return [None if completion == "none" else 0.5 for completion in completions]
    """
    (tmp_path / "half_rewards.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    return "half_rewards:half"


def graded(verify: Verifier, problems: list[Problem], *responses: str, tokens: int = 15) -> list[Grade]:
    return verify.grade(problems, list(responses), [[0] * tokens] * len(responses), Progress())


@pytest.mark.parametrize(("tokens", "reward"), [(0, 0.0), (10, 0.0), (15, -0.5), (19, -0.9), (20, -1.0), (500, -1.0)])
def test_length_is_punished_in_a_straight_line(tokens: int, reward: float) -> None:
    (grade,) = graded(make_verifier("length", DAPO), [Problem("?", "")], "text", tokens=tokens)
    assert (grade.reward, grade.correct) == (pytest.approx(reward), tokens <= 10)


def test_length_wants_tokens_and_its_bounds_in_order() -> None:
    (grade,) = make_verifier("length", DAPO)([Problem("?", "")], ["text"])
    assert grade.failure == "length: the response's tokens are not known"
    with pytest.raises(ValueError, match="most_tokens is 5; wants more than free_tokens, 5"):
        make_verifier("length", {"free_tokens": 5, "most_tokens": 5})


def test_a_form_is_matched_by_the_whole_response_and_cannot_run_away() -> None:
    asked = [Problem("?", "")]
    form = make_verifier("format", {})
    said = ["<think>\na</think> <answer>4</answer>", "<answer>4</answer>", "so <think>a</think><answer>4</answer>"]
    assert [grade.reward for grade in form(asked * 3, said)] == [1.0, 0.0, 0.0]
    runaway = make_verifier("format", {"pattern": "(a+)+b", "timeout_seconds": 1})
    slow, fine = runaway(asked * 2, ["a" * 60, "aab"])
    assert (slow, fine) == (Grade(0.0, False, "format: took longer than 1 seconds"), Grade(1.0, True))
    with pytest.raises(ValueError, match=r"verifier_options\.pattern: .*'\(' is no regular expression"):
        make_verifier("format", {"pattern": "("})


def test_rewards_are_added_by_weight_and_none_of_one_is_left_out(half: str) -> None:
    verify = make_verifiers(["last_number", half, "length"], {"length": DAPO}, 600, weights=[1, 0.2, 0.1])
    right, wrong, without = graded(verify, [Problem("?", "4")] * 3, "4", "5", "none")
    assert [grade.reward for grade in (right, wrong, without)] == pytest.approx([1 + 0.1 - 0.05, 0.1 - 0.05, -0.05])
    assert [grade.correct for grade in (right, wrong, without)] == [True, False, False]
    assert right.parts == {"last_number": 1.0, "half": 0.5, "length": -0.5}
    assert without.parts == {"last_number": 0.0, "length": -0.5}
    (none,) = graded(make_verifiers([half], {}, 600), [Problem("?", "4")], "none")
    assert none.failure is not None and "half: not applicable" in none.failure


def test_a_column_says_which_verifier_grades_a_row() -> None:
    verify = make_verifiers(["exact", "last_number"], {"exact": {"answer": "boxed"}}, 600, column="by")
    asked = [Problem("?", "4", {"by": by}) for by in ("exact", "last_number", "last_number")]
    for problem in asked:
        verify.check_problem(problem)
    grades = graded(verify, asked, "so 4", "so 4", "so 5")
    assert [grade.reward for grade in grades] == [0.0, 1.0, 0.0]
    assert [dict(grade.parts) for grade in grades] == [{"exact": 0.0}, {"last_number": 1.0}, {"last_number": 0.0}]
    with pytest.raises(ValueError, match=r"column 'by' \(verifier_column\) holds 'exakt', .* did you mean 'exact'\?"):
        verify.check_problem(Problem("?", "4", {"by": "exakt"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verifier": []}, r"verifier: \[\]; wants one or more, each with a name of its own"),
        ({"verifier": ["exact", "exact"]}, "each with a name of its own"),
        ({"verifier": ["exact"], "weights": [1, 2]}, "weights: 2 for 1 verifiers"),
        ({"verifier": ["exact"], "weights": [1], "verifier_column": "by"}, "weights and verifier_column are both set"),
        ({"verifier": ["exact"], "verifier_options": {"answer": "boxed"}}, r"\['answer'\] are none of the verifiers"),
        ({"verifier": "exact", "weights": [1]}, "weights and verifier_column are for several verifiers"),
    ],
)
def test_lists_that_do_not_fit_are_errors(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "?", "answer": "1"}\n')
    with pytest.raises(ValueError, match=message):
        FileTask(name="file", path=str(path), **settings)


def test_each_part_of_the_reward_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1", "answer": i + 1}) + "\n" for i in range(8)))
    task = {
        "name": "file",
        "path": str(path),
        "heldout_rows": 2,
        "verifier": ["last_number", "length"],
        "verifier_options": {"length": {"free_tokens": 1, "most_tokens": 100}},
        "weights": [1, 0.5],
    }
    Trainer(tiny_config(tmp_path, task=task, trainer__steps=1, evaluation={"prompts": 2})).train()
    (row,) = rows(tmp_path)
    assert row["reward/length"] < 0
    assert row["reward_mean"] == pytest.approx(row["reward/last_number"] + 0.5 * row["reward/length"], abs=1e-6)
