"""What is compared on a real model: objectives (rows) on tasks, and the runs that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path("recipes/objectives")
"""Of the demo's task, one for each objective; tasks are overrides of them."""
RATES = (4.5e-6, 9e-6, 1.8e-5, 3.6e-5, 7.2e-5)
TUNING_SEED = 100
"""Of the runs that choose a rate, which are not reported."""


@dataclass(frozen=True)
class Task:
    """What is learnt, by which model."""

    overrides: tuple[str, ...] = ()
    rates: tuple[float, ...] = RATES


def reasoning_gym(family: str, params: str, prompt: str) -> Task:
    return Task((f"task={{name: reasoning_gym, family: {family}, params: {params}, prompt: '{prompt}'}}",))


ASKED = "What is {expression} ? Give only the equation with its result."
TASKS = {
    "sums": Task(),
    "chain_sum": reasoning_gym("chain_sum", "{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2}", ASKED),
    "products": reasoning_gym("products", "{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}", ASKED),
    "tiny": Task(
        ("model={name: tiny, precision: float32}", "task={name: echo}", "rollout.max_new_tokens=1"),
        (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    ),
}
SHOWN = ("sums", "chain_sum", "products")
"""Without being asked for; `tiny` is a random model, to try the command on."""


@dataclass(frozen=True)
class Row:
    """An objective: its recipe."""

    recipe: Path
    given: int = 0
    """Responses to each problem, if not the recipe's number."""

    @property
    def samples(self) -> int:
        return self.given or int(_read(self.recipe)["rollout"]["samples"])


@cache
def _read(recipe: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(recipe.read_text()))


EIGHT = ("grpo", "dapo", "dr_grpo")
"""With eight responses to a problem, too."""
ROWS = {path.stem: Row(path) for path in sorted(RECIPES.glob("*.yaml"))}
ROWS |= {f"{name}-x8": Row(ROWS[name].recipe, 8) for name in EIGHT if name in ROWS}


@dataclass(frozen=True)
class Size:
    """How long each run is."""

    steps: int = 96
    responses: int = 32
    """A step, whatever the number of problems that they answer."""
    evaluations: int = 8


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    row: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.row}/rate-{self.rate:g}-seed-{self.seed}"

    def overrides(self, size: Size) -> list[str]:
        samples = ROWS[self.row].samples
        return [
            *TASKS[self.task].overrides,
            f"rollout.prompts={size.responses // samples}",
            f"rollout.samples={samples}",
            f"optim.learning_rate={self.rate!r}",
            f"seed={self.seed}",
            f"trainer.steps={size.steps}",
            f"optim.warmup_steps={size.steps // 12}",
            f"evaluation.every={size.steps // size.evaluations}",
        ]
