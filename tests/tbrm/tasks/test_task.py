from __future__ import annotations

from collections.abc import Sequence

import pytest

from tbrm.tasks import TASKS, Grade, Problem, ProblemStream, Task
from tbrm.tasks.file import FileTask
from tbrm.tasks.reasoning_gym import ReasoningGym


class Counting(Task):
    """Prompts 0, 1, ..., period - 1, 0, 1, ...; the seed shifts them."""

    name: str = "counting"
    period: int

    def problem(self, index: int, seed: int) -> Problem:
        number = (index + seed) % self.period
        return Problem(str(number), str(number))

    def heldout(self, count: int) -> list[Problem]:
        return [Problem(str(number), str(number)) for number in range(count)]

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        raise NotImplementedError


def prompts(problems: Sequence[Problem]) -> list[str]:
    return [str(problem.prompt) for problem in problems]


def test_the_stream_leaves_out_held_out_prompts() -> None:
    task = Counting(period=10)
    stream = ProblemStream(task, seed=0, heldout=task.heldout(7))
    assert prompts(stream.take(4)) == ["7", "8", "9", "7"]
    assert stream.position == 18


def test_a_stream_at_the_saved_position_goes_on_with_the_same_problems() -> None:
    task = Counting(period=10)
    heldout = task.heldout(3)
    straight = ProblemStream(task, seed=4, heldout=heldout)
    straight.take(5)
    resumed = ProblemStream(task, seed=4, heldout=heldout, position=straight.position)
    assert prompts(resumed.take(20)) == prompts(straight.take(20))


def test_a_task_whose_problems_are_all_held_out_is_an_error() -> None:
    task = Counting(period=5)
    stream = ProblemStream(task, seed=0, heldout=task.heldout(5))
    with pytest.raises(
        ValueError, match=r"1000 training problems in a row are among the 5 held out.*evaluation\.prompts"
    ):
        stream.take(1)


def test_equal_conversations_are_the_same_problem_whatever_their_answers() -> None:
    text = Problem("hi", "1")
    conversation = Problem(({"role": "user", "content": "hi"},), "2", {"row": 3})
    with_system = Problem(({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}), "1")
    assert text.key == conversation.key
    assert text.key != with_system.key


def test_tasks_are_found_by_name() -> None:
    assert TASKS("reasoning_gym") is ReasoningGym
    assert TASKS("file") is FileTask
    with pytest.raises(ValueError, match="no task is called 'reasoning-gym': did you mean 'reasoning_gym'"):
        TASKS("reasoning-gym")
