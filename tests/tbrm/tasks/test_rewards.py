"""Reward functions as people write them: TRL's shapes, arrays, async, and those that raise, hang or exit."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tbrm.tasks import Grade, Problem, Progress, Task, user_code
from tbrm.tasks.grading import grade_responses
from tbrm.tasks.time_limit import TooLateError, within
from tbrm.tasks.user_code import UserCodeError
from tbrm.tasks.verifiers.reward_function import RewardFunction

PROBLEMS = [Problem(f"problem {i}", str(i), {"level": i}) for i in range(8)]
RESPONSES = [f"response {i}" for i in range(8)]


def reward(function: Callable[..., Any], seconds: float = 60.0, problems: list[Problem] = PROBLEMS) -> list[Grade]:
    verify = RewardFunction(name="mine:f", function=function, timeout_seconds=seconds)
    return verify.grade(problems, RESPONSES[: len(problems)], [[i] for i in range(len(problems))], Progress(3, 10))


@pytest.mark.parametrize(
    "rewards",
    [
        np.arange(8),
        np.arange(8, dtype=np.float16),
        torch.arange(8),
        torch.arange(8.0, requires_grad=True),
        torch.arange(8, dtype=torch.bfloat16),
        np.arange(8.0)[:, None],
        torch.arange(8.0)[:, None],
        [np.float32(i) for i in range(8)],
        [np.full(1, i) for i in range(8)],
        [torch.tensor(float(i)) for i in range(8)],
        tuple(map(Decimal, range(8))),
        list(map(Fraction, range(8))),
    ],
)
def test_numbers_of_any_kind_are_rewards(rewards: Any) -> None:
    assert [grade.reward for grade in reward(lambda **_: rewards)] == list(range(8))
    assert all(type(grade.reward) is float for grade in reward(lambda **_: rewards))


@pytest.mark.parametrize("value", ["1", "0.5", 1e6 + 1, -2e6, float("nan"), 1j, [1.0], np.ones(2).astype(str)[0], b"1"])
def test_anything_else_is_refused_by_name(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"reward function mine:f: a reward must be a finite number of at most 1e\+06, got "
    ):
        reward(lambda completions, **_: [value] * len(completions))
    with pytest.raises(ValueError, match="a reward must be a finite number"):
        Grade(value, correct=False)


@pytest.mark.parametrize("value", [1.0, "word", {1.0}, torch.tensor(1.0), range(8), None])
def test_what_is_no_list_of_rewards_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="reward function mine:f: "):
        reward(lambda **_: value)


@pytest.mark.parametrize("shape", [(8, 2), (1, 8), (8, 1, 1), (2, 4)])
@pytest.mark.parametrize("array", [np.ones, torch.ones])
def test_an_array_of_another_shape_is_refused_with_its_shape(shape: tuple[int, ...], array: Any) -> None:
    said = (
        rf"wanted 8 rewards, as an array of shape \[8\], got one of shape {re.escape(str(list(shape)))}: sum or choose"
    )
    with pytest.raises(ValueError, match=said):
        reward(lambda **_: array(shape))
    with pytest.raises(ValueError, match=r"mine:f: a reward must be one number, got an array of shape \[2\]"):
        reward(lambda **_: [array(2)] * 8)


def test_none_is_no_reward() -> None:
    grades = reward(lambda level, **_: [None if i % 2 else 1.0 for i in level])
    assert [grade.failure is None for grade in grades] == [True, False] * 4
    assert grades[1] == Grade(0.0, False, "reward function mine:f: not applicable")


def test_token_ids_and_the_trainers_state_are_passed_as_in_trl() -> None:
    def function(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], trainer_state: Any, **_: Any
    ):
        assert (trainer_state.global_step, trainer_state.max_steps) == (3, 10)
        return [float(ids[0]) for ids in completion_ids]

    assert [grade.reward for grade in reward(function)] == list(range(8))


def test_an_async_function_is_awaited_and_keeps_its_loop() -> None:
    loops = set()

    async def function(completions: list[str], **_: Any) -> list[float]:
        loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    class Instance:
        async def __call__(self, **columns: Any) -> list[float]:
            return await function(**columns)

    assert [grade.correct for grade in reward(function) + reward(Instance())] == [True] * 16
    assert len(loops) == 1


def busy(**_: Any) -> list[float]:
    while True:
        pass


def asleep(**_: Any) -> list[float]:
    time.sleep(3600)
    return []


def swallows(**_: Any) -> list[float]:
    try:
        time.sleep(3600)
    except Exception:
        time.sleep(3600)
    return []


async def asleep_in_its_loop(**_: Any) -> list[float]:
    await asyncio.sleep(3600)
    return []


def swallows_all(completions: list[str], **_: Any) -> list[float]:
    for _completion in completions:
        with contextlib.suppress(BaseException):  # as a bare `except:` does
            time.sleep(3600)
    return [1.0] * len(completions)


def raises_instead(**_: Any) -> list[float]:
    try:
        time.sleep(3600)
    except BaseException as error:
        raise RuntimeError("the judge") from error
    return []


async def blocks_its_loop(**_: Any) -> list[float]:
    time.sleep(20)
    return []


@pytest.mark.parametrize(
    "function",
    [busy, asleep, swallows, swallows_all, raises_instead, asleep_in_its_loop, blocks_its_loop],
)
def test_a_function_that_never_returns_is_left(function: Callable[..., Any]) -> None:
    grades = reward(function, seconds=0.2)
    late = "reward function mine:f: took longer than 0.2 seconds (task.reward_timeout_seconds)"
    assert grades == [Grade(0.0, False, late)] * 8
    assert reward(lambda **_: [1.0] * 8)[0].correct

    async def quick(**_: Any) -> list[float]:
        return [1.0] * 8

    assert reward(quick, seconds=5)[0].correct


def test_a_loop_that_is_not_blocked_is_kept_after_a_timeout() -> None:
    loops = set()

    async def function(completions: list[str], **_: Any) -> list[float]:
        loops.add(asyncio.get_running_loop())
        await asyncio.sleep(3600)
        return []

    assert [grade.failure is None for grade in reward(function, 0.1) + reward(function, 0.1)] == [False] * 16
    assert len(loops) == 1


def test_it_is_left_in_another_thread_too() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            within(0.2, lambda: time.sleep(3600))
        except TooLateError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert len(caught) == 1


def test_functions_run_where_alarms_work() -> None:
    """math-verify's time limits, for one, want the main thread."""
    assert within(60, threading.current_thread) is threading.main_thread()


def test_a_timeout_of_its_own_is_an_exception_of_its_own() -> None:
    async def function(**_: Any) -> list[float]:
        raise TimeoutError("the judge")

    with pytest.raises(UserCodeError, match=r"raised TimeoutError\('the judge'\)"):
        reward(function)


def test_the_response_that_it_fails_on_is_named() -> None:
    def function(completions: list[str], **_: Any) -> list[float]:
        return [1 / (completion != "response 5") for completion in completions]

    with pytest.raises(UserCodeError) as caught:
        reward(function)
    assert str(caught.value) == (
        "reward function mine:f raised ZeroDivisionError('division by zero') on the response 'response 5' to 'problem 5'"
    )
    shown = caught.value.own_traceback
    assert pickle.loads(pickle.dumps(caught.value)).own_traceback == shown  # another process may show it
    assert shown.startswith("Traceback")
    assert "return [1 / (completion" in shown
    assert "user_code.py" not in shown
    assert "time_limit.py" not in shown


def test_one_that_fails_on_all_together_says_so() -> None:
    def function(completions: list[str], **_: Any) -> list[float]:
        if len(completions) == 8:
            raise RuntimeError("too many")
        return [0.0] * len(completions)

    with pytest.raises(UserCodeError, match=r"on all responses together, and not on one alone"):
        reward(function)


def test_looking_for_the_response_takes_no_longer_than_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_code, "_PLACING_SECONDS", 0.0)
    calls = []

    def function(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        time.sleep(0.1 * (1 + len(calls)))  # the second longer than the first
        raise ConnectionError("the judge is down")

    with pytest.raises(UserCodeError, match=r"on one of responses 1 to 4 of 8; no time was left to say which"):
        reward(function)
    assert calls == [8, 4]


def test_a_function_that_exits_is_named() -> None:
    with pytest.raises(
        UserCodeError, match=r"reward function mine:f called sys.exit\(3\) on the response 'response 0'"
    ):
        reward(lambda **_: sys.exit(3))


class OwnTask(Task):
    """A user's, since it is not in tbrm."""

    def problem(self, index: int, seed: int) -> Problem:
        return PROBLEMS[index % 8]

    def heldout(self, count: int) -> list[Problem]:
        return []

    def grade(self, problems: Any, responses: Any) -> Any:
        if "response 2" in responses:
            raise KeyError("level")
        return [None] * len(responses)


def test_a_users_own_task_is_treated_alike() -> None:
    task = OwnTask(name="own")
    with pytest.raises(
        UserCodeError, match=r"task own: grade raised KeyError\('level'\) on the response 'response 2' to"
    ):
        grade_responses(task, PROBLEMS, RESPONSES, [None] * 8, Progress())
    with pytest.raises(ValueError, match=r"task own: grade: wanted 2 Grades in a list, got \[None, None\]"):
        grade_responses(task, PROBLEMS[:2], RESPONSES[:2], [None] * 2, Progress())
