"""Tasks: where problems come from and how responses are graded."""

from tbrm.registry import Registry
from tbrm.tasks.task import Grade, Problem, ProblemStream, Progress, Task

TASKS = Registry("task", {"reasoning_gym": "tbrm.tasks.reasoning_gym:ReasoningGym", "file": "tbrm.tasks.file:FileTask"})

__all__ = ["TASKS", "Grade", "Problem", "ProblemStream", "Progress", "Task"]
