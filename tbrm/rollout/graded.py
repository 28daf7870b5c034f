"""Responses as graded text: for training and evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from tbrm.chat import Chat
from tbrm.parallel import World
from tbrm.rollout.interface import Response
from tbrm.tasks import Grade, Problem, Progress, Task
from tbrm.tasks.grading import grade_responses


@dataclass(frozen=True)
class Graded:
    """A response, its text and its grade."""

    number: int
    """Of the problem that it answers."""
    response: Response
    text: str
    grade: Grade


def reward_parts(graded: Sequence[Graded]) -> dict[str, float]:
    """The mean of what each of several verifiers gave, over the responses that it gave something."""
    names = {name for each in graded for name in each.grade.parts}
    given = {name: [each.grade.parts[name] for each in graded if name in each.grade.parts] for name in sorted(names)}
    return {f"reward/{name}": fmean(rewards) for name, rewards in given.items()}


def grade_answers(
    task: Task,
    problems: Sequence[Problem],
    answers: Sequence[Sequence[Response]],
    chat: Chat,
    progress: Progress,
    world: World,
) -> list[Graded]:
    """All responses to each problem, in order; each process grades its share."""
    flat = [(number, response) for number, responses in enumerate(answers) for response in responses]
    texts = [chat.decode(response.token_ids) for _, response in flat]
    ids = [response.token_ids for _, response in flat]
    grader = partial(grade_responses, task, progress=progress)
    grades = world.split(grader, [problems[number] for number, _ in flat], texts, ids)
    return [Graded(*each, text, grade) for each, text, grade in zip(flat, texts, grades, strict=True)]
