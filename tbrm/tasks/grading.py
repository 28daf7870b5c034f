"""Grading as rollouts and evaluations want it: whatever a task's grader does, it is said to have done it."""

from __future__ import annotations

from collections.abc import Sequence

from tbrm.tasks.task import Grade, Problem, Progress, Task
from tbrm.tasks.user_code import explained


def grade_responses(
    task: Task,
    problems: Sequence[Problem],
    responses: Sequence[str],
    completion_ids: Sequence[list[int] | None],
    progress: Progress,
) -> list[Grade]:
    """Raises UserCodeError if a user's own task raises, and ValueError if it gives something else than grades."""

    def call(part: slice) -> list[Grade]:
        return task.grade_completions(problems[part], responses[part], completion_ids[part], progress)

    if type(task).__module__.startswith("tbrm."):
        return call(slice(None))
    grades = explained(f"task {task.name}: grade", call, problems, responses)
    if len(grades) != len(responses) or not all(isinstance(each, Grade) for each in grades):
        raise ValueError(f"task {task.name}: grade: wanted {len(responses)} Grades in a list, got {grades!r:.200}")
    return grades
