"""Recorded trajectories: JSON lines that `tbrm rollout` or anybody else wrote, read for training and for auditing.

Each line holds `prompt` (text) or `messages` (a chat), `response` (text) and `reward`; optionally `truncated`. Lines that
also hold `prompt_ids` and `response_ids`, as those of `tbrm rollout` do, are used token for token; otherwise the text is
encoded with the model's chat template and, unless truncated, the end-of-sequence token is appended.

A line without `reward` is graded, where there is a task: it then holds the problem's `answer`, and in `entry` what else
the task's verifier wants to know of a problem (reasoning_gym's: `{"position": ...}`).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from array import array
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from tbrm.chat import encode_messages
from tbrm.config import RolloutConfig
from tbrm.data import Trajectory
from tbrm.metrics import Phases
from tbrm.rollout.base import derive_seed
from tbrm.rollout.collect import WAITING, Collected, load_collected
from tbrm.stored import score_columns, scores_at
from tbrm.tasks import Problem, Task

_SCORES = "scores.safetensors"


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
        save_file(score_columns(self.trajectories), folder / _SCORES, metadata=said)

    def restore(self, folder: Path) -> list[Collected]:
        """Takes the scores back, unless they are of other trajectories; returns what was waiting."""
        if not (folder / _SCORES).exists():  # an earlier version's
            return load_collected(folder / WAITING)
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


def read_trajectories(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, eos_ids: list[int], task: Task | None = None
) -> list[Trajectory]:
    """All trajectories of a JSON lines file. Raises ValueError naming the line and the field."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"trajectories file {str(path)!r} cannot be read: {error.strerror}") from error
    groups: dict[tuple[int, ...], int] = {}
    trajectories = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            trajectory = trajectory_of(json.loads(line), tokenizer, eos_ids, task)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        trajectory.group = groups.setdefault(tuple(trajectory.prompt_ids), len(groups))
        trajectories.append(trajectory)
    if not trajectories:
        raise ValueError(f"trajectories file {str(path)!r} holds no trajectories")
    return trajectories


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Token ids and rewards, as `read_trajectories` reads them."""
    with path.open("w") as file:
        for trajectory in trajectories:
            row = {name: value for name, value in vars(trajectory).items() if name != "reference"}
            file.write(json.dumps(row) + "\n")


def without_prompts(trajectories: Iterable[Trajectory], heldout: Iterable[list[int]]) -> list[Trajectory]:
    """The trajectories whose prompt is not among the held-out ones."""
    forbidden = {tuple(prompt) for prompt in heldout}
    return [trajectory for trajectory in trajectories if tuple(trajectory.prompt_ids) not in forbidden]


def trajectory_of(
    row: Any, tokenizer: PreTrainedTokenizerBase, eos_ids: list[int], task: Task | None = None
) -> Trajectory:
    """One line's. Raises ValueError naming the field."""
    if not isinstance(row, dict):
        raise ValueError(f"got {type(row).__name__}; wants an object with prompt or messages, response and reward")
    if "reward" not in row and task is not None:
        row = {**row, "reward": _grade(row, task)}
    trajectory = _trajectory(row, tokenizer, eos_ids)
    if not trajectory.response_ids:
        raise ValueError("response: empty; there is no action to learn from")
    return trajectory


def _grade(row: dict[str, Any], task: Task) -> float:
    for field in ("response", "answer"):
        if not isinstance(row.get(field), str):
            raise ValueError(f"{field}: got {row.get(field)!r}; wants text, to grade a line without reward")
    problem = Problem(tuple(_messages(row)), row["answer"], row.get("entry", {}))
    try:
        [grade] = task.grade([problem], [row["response"]])
    except KeyError as error:
        raise ValueError(f"entry: holds no {error}, which task {task.name} grades a line without reward by") from error
    return grade.reward


def _trajectory(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, eos_ids: list[int]) -> Trajectory:
    reward = row.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise ValueError(f"reward: got {reward!r}; wants a number")
    if not math.isfinite(reward):
        raise ValueError(f"reward: got {reward!r}; wants a finite number")
    truncated = row.get("truncated", False)
    if not isinstance(truncated, bool):
        raise ValueError(f"truncated: got {truncated!r}; wants true or false")
    if "prompt_ids" in row or "response_ids" in row:
        return Trajectory(
            _token_ids(row, "prompt_ids", len(tokenizer)),
            _token_ids(row, "response_ids", len(tokenizer)),
            float(reward),
            truncated,
            weight_version=None,
        )
    response = row.get("response")
    if not isinstance(response, str):
        raise ValueError(f"response: got {response!r}; wants text")
    prompt_ids = encode_messages(tokenizer, _messages(row))
    response_ids = list(tokenizer(response, add_special_tokens=False).input_ids) + ([] if truncated else eos_ids[:1])
    return Trajectory(prompt_ids, response_ids, float(reward), truncated, weight_version=None)


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    if isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    messages = row.get("messages")
    if not (isinstance(messages, list) and messages):
        raise ValueError("neither prompt (text) nor messages (a list of role and content) is given")
    for message in messages:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise ValueError(f"messages: got {message!r}; wants objects with role and content")
    return messages


def _token_ids(row: dict[str, Any], field: str, vocabulary: int) -> list[int]:
    ids = row.get(field)
    if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < vocabulary for i in ids)):
        raise ValueError(f"{field}: wants a list of token ids from 0 to {vocabulary - 1} of this model's tokenizer")
    return ids
