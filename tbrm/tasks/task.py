"""What a task is: an endless stream of problems to train on, a held-out set, and a grader."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from tbrm.registry import GIVEN
from tbrm.tasks.messages import Message, Tool

_LARGEST_REWARD = 1e6  # beyond it, float32 has no room for what rewards differ by


@dataclass(frozen=True)
class Problem:
    """One prompt and what its grader needs to know."""

    prompt: str | tuple[Message, ...]
    """Plain text, put to the model as one user message, or a whole conversation: {"role": ..., "content": ...}. One that ends
    with the assistant's message is continued."""
    answer: str
    """The reference answer, as text (shown in reports; most verifiers compare with it)."""
    entry: dict[str, Any] = field(default_factory=dict)
    """The rest of the problem's row, for verifiers that want more than the answer."""
    tools: tuple[Tool, ...] = ()
    """What the model is told it can call."""
    alternatives: tuple[str, ...] = ()
    """Other reference answers, each as right as `answer`."""

    @property
    def answers(self) -> tuple[str, ...]:
        """All that are right."""
        return (self.answer, *self.alternatives)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as a conversation."""
        return ({"role": "user", "content": self.prompt},) if isinstance(self.prompt, str) else self.prompt

    @property
    def key(self) -> str:
        """What makes two problems the same for the held-out check: who said and called what, and with which tools, white space
        aside. Ids, earlier turns' reasoning and whatever else messages hold do not count, as templates need not show them: to
        take two problems for one only holds out more."""
        return json.dumps([[_said(message) for message in self.messages], self.tools], sort_keys=True, default=str)


def _said(message: Message) -> Message:
    calls = [{key: part for key, part in call.items() if key != "id"} for call in message.get("tool_calls") or ()]
    said = {"role": message["role"], "content": plain(message["content"]), "name": message.get("name"), "calls": calls}
    return {key: part for key, part in said.items() if part}


def plain(text: str) -> str:
    """The text without differences of white space."""
    return " ".join(text.split())


@dataclass(frozen=True)
class Grade:
    """A verifier's word on one response."""

    reward: float
    """A number of any kind, numpy's and torch's included; finite, and no larger than 1e6."""
    correct: bool
    failure: str | None = None
    """Why the response could not be graded (reward 0 then); None if it was. `rollout.ungraded` says what becomes of it."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """By verifier, what it gave, where there are several: logged as reward/NAME."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", _number(self.reward))


def _number(reward: Any) -> float:
    if shape := [size for size in getattr(reward, "shape", ()) if size != 1]:
        raise ValueError(f"a reward must be one number, got an array of shape {shape}")
    value = reward.item() if hasattr(reward, "item") else reward
    if not isinstance(value, Real | Decimal) or not abs(value) <= _LARGEST_REWARD:  # type: ignore[operator]
        raise ValueError(f"a reward must be a finite number of at most {_LARGEST_REWARD:g}, got {reward!r:.200}")
    return float(value)


@dataclass(frozen=True)
class Progress:
    """How far training is when a response is graded."""

    step: int = 0
    """Optimiser steps taken."""
    steps: int = 0
    """In all."""


class Task(ABC, BaseModel):
    """Base of all tasks. The fields are the keys of the recipe's `task` section."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(
        GIVEN,
        description="Which task: reasoning_gym, file, echo, package.module:Class, or given, an object (docs/python.md).",
    )
    correct_at: float = Field(
        1.0,
        description="Least reward of a response that counts as correct, in accuracy; 1: a verifier of your own says.",
    )

    def is_correct(self, reward: float) -> bool:
        """Whether a response with this reward counts in the accuracy."""
        return reward >= self.correct_at - 1e-6

    @abstractmethod
    def problem(self, index: int, seed: int) -> Problem:
        """The training problem at `index` >= 0 of the endless stream of `seed`: a pure function of the two."""

    @abstractmethod
    def heldout(self, count: int) -> list[Problem]:
        """`count` distinct held-out problems, the same on every call and for every training seed."""

    def heldout_size(self) -> int | None:
        """How many distinct problems can be held out; None: as many as are wanted."""
        return None

    def files(self) -> dict[str, str]:
        """The files that problems are read from, by the key that names them: a resumed run wants them as they were."""
        return {}

    def withheld(self, count: int) -> Sequence[Problem]:
        """All problems that are never trained on, where evaluations take `count` of them."""
        return self.heldout(count)

    def graded_by(self, reward: Callable[..., Any]) -> Self:
        """The same problems, graded by a reward function. Raises ValueError where the task grades by itself."""
        raise ValueError(
            f"reward: a function was given, and task {self.name!r} has a grader of its own: leave the function out, or take "
            "task.name file with task.verifier given"
        )

    def require_objects(self) -> None:
        """Raises ValueError where an object is wanted that no recipe can hold, and was not given."""

    def notes(self) -> list[str]:
        """What a user should know of the problems before training, a line each."""
        return []

    @abstractmethod
    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        """One grade for each response; problems[i] is what responses[i] answers."""

    def grade_completions(
        self,
        problems: Sequence[Problem],
        responses: Sequence[str],
        completion_ids: Sequence[list[int] | None],
        progress: Progress,
    ) -> list[Grade]:
        """`grade`, for tasks that look at token ids (None: not known), or at how far training is, too."""
        return self.grade(problems, responses)


class ProblemStream:
    """The training problems in order. `position` is all of its state: set it to resume."""

    def __init__(self, task: Task, seed: int, heldout: Sequence[Problem], position: int = 0) -> None:
        self.task = task
        self.seed = seed
        self.position = position
        self._heldout = frozenset(problem.key for problem in heldout)

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems, held-out ones left out."""
        taken: list[Problem] = []
        skipped = 0
        while len(taken) < count:
            problem = self.task.problem(self.position, self.seed)
            self.position += 1
            if problem.key not in self._heldout:
                taken.append(problem)
                skipped = 0
            elif (skipped := skipped + 1) > 1000:
                raise ValueError(
                    f"task: 1000 training problems in a row are among the {len(self._heldout)} held out: "
                    "the task has too few distinct problems; lower evaluation.prompts or widen the task"
                )
        return taken
