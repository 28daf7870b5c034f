"""Recorded trajectories: JSON lines that `tbrm rollout` or anybody else wrote, read for training and for auditing.

Each line holds `prompt` (text, or a chat) or `messages` (a chat), `response` (text) and `reward`; optionally `truncated`
and `tools`. Lines that also hold `prompt_ids` and `response_ids`, as those of `tbrm rollout` do, are used token for token,
and may say in `action_mask` which response tokens the policy chose, and in `response_logprobs` how likely each was where it was
sampled; otherwise the text is encoded with the model's chat
template and, unless it is truncated or has its end, the token that ends a turn is appended.

A line without `reward` is graded, where there is a task: it then holds the problem's `answer`, and beside it, or
in `entry`, what else the task's verifier wants to know of a problem (reasoning_gym's: `{"position": ...}`).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from tbrm.chat import Chat, check_token_ids
from tbrm.config.rollout import RolloutConfig
from tbrm.experience.collect import WAITING, Collected, load_collected
from tbrm.reporting.metrics import Phases
from tbrm.rollout.interface import derive_seed
from tbrm.storage.files import save_tensors
from tbrm.tasks import Problem, Task
from tbrm.tasks.grading import grade_responses
from tbrm.tasks.messages import read_messages, read_tools
from tbrm.tasks.task import Progress, plain
from tbrm.trajectories.stored import score_columns, scores_at
from tbrm.trajectories.trajectory import Trajectory

_SCORES = "scores.safetensors"
_ROUNDED = 1e-3  # above 0, where a log-prob was rounded


class FileSource:
    """Deals a file's trajectories out in a seeded order, reshuffled each epoch. Its state is `position`, and what the
    reference said of the trajectories in earlier epochs: said anew, in another packing, it would differ in its last bits."""

    def __init__(self, trajectories: list[Trajectory], config: RolloutConfig, seed: int) -> None:
        self.trajectories = trajectories
        self.per_step = config.prompts * config.samples
        self.seed = seed
        self.position = 0

    def save(self, folder: Path, waiting: Iterable[Collected]) -> None:
        """Into a checkpoint: the scores of all trajectories, and which of them are `waiting` for their step."""
        number = {id(trajectory): i for i, trajectory in enumerate(self.trajectories)}
        steps = [[number[id(trajectory)] for trajectory in collected.trajectories] for collected in waiting]
        said = {"of": self._fingerprint, "waiting": json.dumps(steps)}
        save_tensors(score_columns(self.trajectories), folder / _SCORES, said)

    def restore(self, folder: Path) -> list[Collected]:
        """Takes the scores back, unless they are of other trajectories; returns what was waiting."""
        if not (folder / _SCORES).exists():  # an earlier version's, which has copies of those that wait
            ours = {_content(t): t for t in self.trajectories}
            waiting = load_collected(folder / WAITING)
            if not all(_content(t) in ours for collected in waiting for t in collected.trajectories):
                return []
            return [Collected([ours[_content(t)] for t in collected.trajectories]) for collected in waiting]
        with safe_open(folder / _SCORES, framework="pt") as file:
            said, columns = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if said["of"] != self._fingerprint:
            return []
        for trajectory, score in zip(
            self.trajectories, map(scores_at(columns), range(len(self.trajectories))), strict=True
        ):
            trajectory.reference = score
        return [Collected([self.trajectories[i] for i in step]) for step in json.loads(said["waiting"])]

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for t in self.trajectories:
            lengths = (len(t.prompt_ids), len(t.response_ids))
            digest.update(array("q", [*lengths, *t.prompt_ids, *t.response_ids, *t.actions]).tobytes())
        return digest.hexdigest()

    def collect(self, step: int, phases: Phases) -> Collected:
        with phases("rollout"):
            taken: list[Trajectory] = []
            while len(taken) < self.per_step:
                epoch, offset = divmod(self.position, len(self.trajectories))
                order = list(range(len(self.trajectories)))
                random.Random(derive_seed("epoch", self.seed, epoch)).shuffle(order)
                part = order[offset : offset + self.per_step - len(taken)]
                taken += [self.trajectories[i] for i in part]
                self.position += len(part)
        return Collected(taken)


def _content(trajectory: Trajectory) -> tuple[object, ...]:
    """What makes two of a file's trajectories the same."""
    return *trajectory.prompt_ids, -1, *trajectory.response_ids, -1, *trajectory.actions, trajectory.reward


def read_trajectories(path: str | Path, rows: RowReader) -> list[Trajectory]:
    """All trajectories of a JSON lines file but those of held-out problems. Raises ValueError naming the line and the field."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"trajectories file {str(path)!r} cannot be read: {error.strerror}") from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"trajectories file {str(path)!r} holds no trajectories")
    groups: dict[tuple[int, ...], int] = {}
    trajectories = []
    for number, line in enumerate(lines, start=1):
        if (trajectory := rows.read(line, f"{path}:{number}")) is not None:
            trajectory.group = groups.setdefault(tuple(trajectory.prompt_ids), len(groups))
            trajectories.append(trajectory)
    return trajectories


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Token ids and rewards, as `read_trajectories` reads them."""
    with path.open("w") as file:
        for trajectory in trajectories:
            fields = ("reward", "truncated", "group", "weight_version")
            row = {name: getattr(trajectory, name) for name in fields}
            file.write(json.dumps(row | token_columns(trajectory)) + "\n")


def token_columns(trajectory: Trajectory) -> dict[str, Any]:
    """What a line says of its tokens."""
    columns: dict[str, Any] = {"prompt_ids": trajectory.prompt_ids, "response_ids": trajectory.response_ids}
    if trajectory.action_mask is not None:
        columns["action_mask"] = trajectory.action_mask
    if trajectory.behaviour_logprobs is not None:
        said = dict(zip(trajectory.actions, trajectory.behaviour_logprobs.tolist(), strict=True))
        columns["response_logprobs"] = [said.get(i) for i in range(len(trajectory.response_ids))]
    return columns


class RowReader:
    """What the lines of a file are to one model: trajectories, and none of the problems that are `heldout`, nor of what could
    not be graded, unless that has reward 0. `seen`, `left_out` and `ungraded` count them."""

    def __init__(
        self,
        chat: Chat,
        task: Task | None = None,
        heldout: Sequence[Problem] = (),
        ungraded: Literal["drop", "zero"] = "drop",
        *,
        grades: bool = True,
    ) -> None:
        """Unless it `grades`, a line without reward has reward 0, for who wants no rewards."""
        self.chat = chat
        self.task = task
        self.grades = grades
        self.drops_ungraded = ungraded == "drop"
        self.seen = 0
        self.left_out = 0
        self.ungraded = 0
        # A row shows its problem in words, in token ids, or in both.
        self._heldout = {problem.key for problem in heldout}
        self._heldout |= {self._shown(chat.encode(problem.messages, problem.tools)) for problem in heldout}

    def read(self, line: bytes, where: str) -> Trajectory | None:
        """One line's; None if the line is blank, its problem held out, or it could not be graded. Raises ValueError with
        `where` the line is, and the field."""
        if not line.strip():
            return None
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(
                    f"got {type(row).__name__}; wants an object with prompt or messages, response and reward"
                )
            trajectory = self._trajectory(row)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:  # numbers and nesting without end, too
            raise ValueError(f"{where}: {error}") from error
        self.seen += 1
        return trajectory

    def counts(self) -> list[str]:
        """What became of lines that are no trajectories, a phrase each."""
        held_out = [f"{self.left_out} of {self.seen} left out: their problems are held out"] * (self.left_out > 0)
        return held_out + [f"{self.ungraded} of {self.seen} could not be graded"] * (self.ungraded > 0)

    def _trajectory(self, row: dict[str, Any]) -> Trajectory | None:
        in_ids = "prompt_ids" in row or "response_ids" in row
        problem = None if in_ids and not (row.get("prompt") or row.get("messages")) else _problem(row)
        if in_ids:
            prompt_ids = self._token_ids(row, "prompt_ids")
        else:
            assert problem is not None
            prompt_ids = self.chat.encode(problem.messages, problem.tools)
        if self._is_held_out(prompt_ids, problem):
            self.left_out += 1
            return None
        truncated = row.get("truncated", False)
        if not isinstance(truncated, bool):
            raise ValueError(f"truncated: got {truncated!r}; wants true or false")
        if in_ids:
            response_ids = self._token_ids(row, "response_ids")
        else:
            response_ids = self.chat.encode_response(_text(row, "response"), truncated=truncated)
        if not response_ids:
            raise ValueError("response: empty; there is no action to learn from")
        self.chat.check_length("response", prompt_ids, len(response_ids))
        reward = self._reward(row, problem, response_ids)
        if reward is None:
            return None
        mask = _action_mask(row, response_ids, in_ids=in_ids)
        said = _behaviour(row, mask or [True] * len(response_ids), in_ids=in_ids)
        return Trajectory(
            prompt_ids,
            response_ids,
            reward,
            truncated,
            weight_version=None,
            action_mask=mask,
            behaviour_logprobs=said,
        )

    def _is_held_out(self, prompt_ids: Sequence[int], problem: Problem | None) -> bool:
        if not self._heldout:
            return False
        return self._shown(prompt_ids) in self._heldout or (problem is not None and problem.key in self._heldout)

    def _reward(self, row: dict[str, Any], problem: Problem | None, response_ids: list[int]) -> float | None:
        if "reward" not in row and self.task is not None:
            return self._grade(row, problem, response_ids, self.task) if self.grades else 0.0
        reward = row.get("reward")
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            raise ValueError(f"reward: got {reward!r}; wants a number")
        if not math.isfinite(reward):
            raise ValueError(f"reward: got {reward!r}; wants a finite number")
        return float(reward)

    def _grade(self, row: dict[str, Any], problem: Problem | None, response_ids: list[int], task: Task) -> float | None:
        """As a rollout's response is graded."""
        answer = _text(row, "answer", ", to grade a line without reward")
        if problem is None:
            raise ValueError("prompt: missing, to grade a line without reward")
        problem = replace(problem, answer=answer, entry=row.get("entry", row))
        try:
            [grade] = grade_responses(task, [problem], [self.chat.decode(response_ids)], [response_ids], Progress())
        except KeyError as error:
            raise ValueError(
                f"entry: holds no {error}, which task {task.name} grades a line without reward by"
            ) from error
        if grade.failure is None:
            return grade.reward
        self.ungraded += 1
        return None if self.drops_ungraded else 0.0

    def _token_ids(self, row: dict[str, Any], field: str) -> list[int]:
        ids = row.get(field)
        if not (isinstance(ids, list) and all(type(i) is int for i in ids)):
            raise ValueError(f"{field}: got {ids!r:.100}; wants a list of token ids")
        check_token_ids(field, ids, self.chat.vocabulary)
        return ids

    def _shown(self, prompt_ids: Sequence[int]) -> str:
        """The prompt as text, white space aside."""
        return plain(self.chat.decode(prompt_ids))


def _problem(row: dict[str, Any]) -> Problem:
    tools = read_tools("tools", row.get("tools"))
    field = "messages" if row.get("prompt") is None else "prompt"
    shown = row.get(field)
    if shown is None:
        raise ValueError("neither prompt (text) nor messages (a list of role and content) is given")
    return Problem(shown if isinstance(shown, str) else read_messages(field, shown), "", tools=tools)


def _text(row: dict[str, Any], field: str, purpose: str = "") -> str:
    text = row.get(field)
    if not isinstance(text, str):
        raise ValueError(f"{field}: got {text!r}; wants text{purpose}")
    return text


def _action_mask(row: dict[str, Any], response_ids: Sequence[int], *, in_ids: bool) -> list[bool] | None:
    mask = row.get("action_mask")
    if mask is None:
        return None
    if not in_ids:
        raise ValueError("action_mask: given without response_ids, whose tokens it is of")
    if not (isinstance(mask, list) and len(mask) == len(response_ids) and all(i in (True, False) for i in mask)):
        raise ValueError(
            f"action_mask: got {mask!r:.100}; wants true or false for each of {len(response_ids)} response_ids"
        )
    if not any(mask):
        raise ValueError("action_mask: all false; there is no action to learn from")
    return [bool(chosen) for chosen in mask]


def _behaviour(row: dict[str, Any], chosen: Sequence[bool], *, in_ids: bool) -> Tensor | None:
    """What the line says of the tokens that the policy chose; of others it may say anything."""
    logprobs = row.get("response_logprobs")
    if logprobs is None:
        return None
    if not in_ids:
        raise ValueError("response_logprobs: given without response_ids, whose tokens they are of")
    if not isinstance(logprobs, list) or len(logprobs) != len(chosen):
        raise ValueError(f"response_logprobs: got {logprobs!r:.100}; wants one for each of {len(chosen)} response_ids")
    actions = [logprob for logprob, is_action in zip(logprobs, chosen, strict=True) if is_action]
    for logprob in actions:
        if isinstance(logprob, bool) or not isinstance(logprob, int | float) or not -math.inf < logprob <= _ROUNDED:
            raise ValueError(f"response_logprobs: got {logprob!r}; wants a finite number, 0 or less")
    return torch.tensor(actions, dtype=torch.float32)
