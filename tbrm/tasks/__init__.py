"""Tasks: where problems come from and how responses are graded."""

from tbrm import needs_train  # noqa: F401
from tbrm.registry import GIVEN, Registry
from tbrm.tasks.task import Grade, Problem, ProblemStream, Progress, Task

TASKS = Registry(
    "task",
    {
        "reasoning_gym": "tbrm.tasks.reasoning_gym:ReasoningGym",
        "file": "tbrm.tasks.file:FileTask",
        "echo": "tbrm.tasks.echo:Echo",
        GIVEN: "tbrm.tasks.given:GivenTask",
    },
)

__all__ = ["TASKS", "Grade", "Problem", "ProblemStream", "Progress", "Task"]
