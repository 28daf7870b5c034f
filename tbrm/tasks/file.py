"""Problems read from a JSON Lines or Parquet file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from tbrm.registry import GIVEN, path_of
from tbrm.storage.path_keys import ExpandedPath
from tbrm.tasks.columns import AnswerFrom, Columns
from tbrm.tasks.row_files import find_files, read_rows
from tbrm.tasks.task import Grade, Problem, Progress, Task
from tbrm.tasks.verifiers import Verifier, make_verifier, make_verifiers
from tbrm.tasks.verifiers.reward_function import RewardFunction


class FileTask(Task):
    """Prompts and answers from a file, one row each, graded by a verifier.

    The file is read when the task is made. Training takes its rows in a new random order each epoch.
    """

    path: ExpandedPath | list[ExpandedPath] = Field(
        description="The problems: a .jsonl, .json, .csv or .parquet file, which may end in .gz or .zst; a folder that "
        "datasets saved to disk; a pattern with *; hub:NAME[:CONFIG[:SPLIT]], such as hub:openai/gsm8k:main:train; or a list "
        "of these."
    )
    heldout_path: ExpandedPath | list[ExpandedPath] | None = Field(None, description="The same, for evaluation only.")
    heldout_rows: int = Field(
        0,
        ge=0,
        description="Rows at the end of `path` whose problems are kept for evaluation; other rows of them are left out.",
    )
    prompt_column: str = Field(
        "prompt", description="Column of the prompts: text, or a list of chat messages. a.b is b within the column a."
    )
    prompt_template: str | None = Field(
        None, description="Prompt made of columns, in place of prompt_column: 'Question: {question} Answer:'."
    )
    answer_column: str = Field(
        "answer",
        description="Column of the reference answers: text, a number, or a list of these, each of which is right.",
    )
    answer_from: AnswerFrom = Field(
        "whole",
        description="Where in that column the answer is: whole, hashes (after ####, as in GSM8K) or boxed (as in MATH).",
    )
    tools_column: str = Field("tools", description="Column, if there is one, of the tools that the model is told of.")
    system: str | None = Field(None, description="System message before each prompt.")
    verifier: str | list[str] = Field(
        description="What grades a response: exact, last_number, math_verify, choice, format, length, package.module:function "
        "with the signature of TRL's reward functions, or given, such a function itself (docs/python.md). Of a list the "
        "rewards are added up."
    )
    verifier_options: dict[str, Any] = Field(
        {},
        description="Options of the verifier, such as {timeout_seconds: 10}; of a list, {verifier: {option: value}}.",
    )
    weights: list[float] = Field(
        [], description="Weight of each of several verifiers in the sum of their rewards; 1 if empty."
    )
    verifier_column: str | None = Field(
        None, description="Column that says which of several verifiers grades a row, in place of their sum."
    )
    reward_timeout_seconds: float = Field(
        600.0, gt=0, description="A reward function that takes longer over a batch is left: its responses are ungraded."
    )

    _training: tuple[Problem, ...] = PrivateAttr()
    _heldout: tuple[Problem, ...] = PrivateAttr()
    _repeats: int = PrivateAttr()
    _verify: Verifier = PrivateAttr()
    _columns: set[str] = PrivateAttr()

    @model_validator(mode="after")
    def _read(self) -> FileTask:
        if self.heldout_path is not None and self.heldout_rows:
            raise ValueError("heldout_path and heldout_rows are both set: choose one")
        self._verify = self._make_verifier()
        problems = tuple(self._problems(self.path))
        self._columns = {name for problem in problems for name in problem.entry}
        self._verify.check_columns(self._columns)
        if self.heldout_rows >= len(problems):
            raise ValueError(
                f"heldout_rows is {self.heldout_rows} and {self.path} has {len(problems)} rows: none left to train on"
            )
        split = len(problems) - self.heldout_rows
        self._heldout = problems[split:] if self.heldout_path is None else tuple(self._problems(self.heldout_path))
        # All of them, also those that a run does not evaluate: another evaluation may.
        forbidden = {problem.key for problem in self._heldout}
        self._training = tuple(problem for problem in problems[:split] if problem.key not in forbidden)
        self._repeats = split - len(self._training)
        return self

    def _make_verifier(self) -> Verifier:
        options, seconds = self.verifier_options, self.reward_timeout_seconds
        if isinstance(self.verifier, list):
            return make_verifiers(self.verifier, options, seconds, self.weights, self.verifier_column)
        if self.weights or self.verifier_column:
            raise ValueError("weights and verifier_column are for several verifiers: give verifier a list")
        return make_verifier(self.verifier, options, seconds)

    def graded_by(self, reward: Callable[..., Any]) -> Self:
        if self.verifier != GIVEN:
            raise ValueError(
                f"reward: a function was given, and task.verifier is {self.verifier}: set that to given, or leave the "
                "function out"
            )
        if not callable(reward):
            raise ValueError(
                f"reward: got {reward!r:.100}; wants a function with the signature of TRL's reward functions"
            )
        path = path_of(reward)
        name = path or getattr(reward, "__name__", type(reward).__name__)
        verify = RewardFunction(name=name, function=reward, timeout_seconds=self.reward_timeout_seconds)
        verify.check_columns(self._columns)
        task = self.model_copy(update={"verifier": path or GIVEN})
        task._verify = verify
        return task

    def require_objects(self) -> None:
        self._verify.require_objects()

    def notes(self) -> list[str]:
        if not self._repeats:
            return []
        rows = self._repeats + len(self._training)
        return [f"task: {self._repeats} of {rows} training rows of {self.path} left out: their problems are held out"]

    def problem(self, index: int, seed: int) -> Problem:
        if not self._training:
            raise ValueError(f"every problem of {self.path} is held out: none left to train on")
        epoch, place = divmod(index, len(self._training))
        return self._training[_order(len(self._training), seed, epoch)[place]]

    def heldout_size(self) -> int:
        return len({problem.key for problem in self._heldout})

    def heldout(self, count: int) -> list[Problem]:
        distinct = list({problem.key: problem for problem in self._heldout}.values())
        if count > len(distinct):
            source = f"heldout_path {self.heldout_path}" if self.heldout_path else f"heldout_rows {self.heldout_rows}"
            raise ValueError(
                f"evaluation wants {count} distinct held-out prompts, and {source} gives {len(distinct)}: lower "
                "evaluation.prompts, or set heldout_path or heldout_rows to hold out more"
            )
        return distinct[:count]

    def files(self) -> dict[str, str]:
        """The files, by key; of several, or of a folder's, by key and name."""
        named = {"path": self.path} | ({} if self.heldout_path is None else {"heldout_path": self.heldout_path})
        return {name: file for key, paths in named.items() for name, file in _by_name(key, paths)}

    def withheld(self, count: int) -> Sequence[Problem]:
        return self._heldout

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return self.grade_completions(problems, responses, [None] * len(responses), Progress())

    def grade_completions(
        self,
        problems: Sequence[Problem],
        responses: Sequence[str],
        completion_ids: Sequence[list[int] | None],
        progress: Progress,
    ) -> list[Grade]:
        grades = self._verify.grade(problems, responses, completion_ids, progress)
        if self.correct_at == type(self).model_fields["correct_at"].default:
            return grades
        return [replace(g, correct=g.failure is None and self.is_correct(g.reward)) for g in grades]

    def _problems(self, paths: str | list[str]) -> Iterator[Problem]:
        columns = Columns(
            self.prompt_column,
            self.prompt_template,
            self.answer_column,
            self.answer_from,
            self.tools_column,
            self.system,
        )
        for place, row in read_rows(paths):
            try:
                problem = columns.problem(row)
                self._verify.check_problem(problem)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            yield problem


def _by_name(key: str, paths: str | list[str]) -> Iterator[tuple[str, str]]:
    found = [file for path in find_files(paths) for file in (sorted(path.glob("*.arrow")) if path.is_dir() else [path])]
    if len(found) == 1 and isinstance(paths, str):
        yield key, str(found[0])
    else:
        yield from ((f"{key}/{file.name}", str(file)) for file in found)


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> list[int]:
    """The order of the rows in an epoch: a permutation of range(rows)."""
    return random.Random(f"{seed} {epoch}").sample(range(rows), rows)
