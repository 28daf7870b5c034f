from __future__ import annotations

import pytest
from pydantic import ValidationError

from tbrm.tasks import Problem, ProblemStream
from tbrm.tasks.echo import Echo


def test_prompts_end_with_the_answer_and_follow_from_index_and_seed() -> None:
    task = Echo(letters=3)
    problems = [task.problem(index, seed=1) for index in range(300)]
    assert all(p.prompt[:3].isalpha() and p.prompt[3:] == p.answer and p.answer.isdecimal() for p in problems)
    assert {p.answer for p in problems} == set("0123456789")
    assert problems == [task.problem(index, seed=1) for index in range(300)]
    assert problems != [task.problem(index, seed=2) for index in range(300)]


def test_what_is_held_out_is_distinct_and_never_trained_on() -> None:
    task = Echo(letters=2)  # few prompts, so that many are drawn again
    held_out = task.heldout(400)
    assert held_out[:100] == task.heldout(100)
    keys = {problem.key for problem in held_out}
    assert len(keys) == 400
    drawn = {task.problem(index, 0).key for index in range(2000)}
    assert keys & drawn
    assert not keys & {problem.key for problem in ProblemStream(task, 0, held_out).take(2000)}


def test_more_held_out_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"letters: 2 and a digit make 6760 prompts, and evaluation wants 4000: lower"):
        Echo(letters=2).heldout(4000)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Echo(letters=1)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("7", True),
        ("x7!", True),
        ("77", False),
        ("71", False),
        ("3", False),
        ("seven", False),
        ("", False),
        ("٧", False),
    ],
)
def test_right_is_a_response_whose_only_digit_is_that_one(response: str, right: bool) -> None:
    [grade] = Echo().grade([Problem("kqz7", "7")], [response])
    assert (grade.reward, grade.correct) == (float(right), right)
