"""Where a training step's trajectories come from: rollouts of the policy on the task's problems, graded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from tbrm.chat import Chat
from tbrm.config.rollout import RolloutConfig
from tbrm.parallel import ALONE, World
from tbrm.reporting.metrics import Phases
from tbrm.reporting.progress import Watch, unwatched
from tbrm.rollout.graded import Graded, grade_answers, reward_parts
from tbrm.rollout.interface import RolloutEngine, Sampling, make_requests
from tbrm.tasks import Problem, ProblemStream, Progress
from tbrm.trajectories.stored import load_trajectories, save_trajectories
from tbrm.trajectories.trajectory import Trajectory

WAITING = "waiting"
"""A checkpoint's folder of what is collected and not trained on yet."""


@dataclass
class Collected:
    """One step's fresh trajectories, and what only their maker knows of them."""

    trajectories: list[Trajectory]
    problems: list[Problem] = field(default_factory=list)
    """The problem of each trajectory, if it has one."""
    metrics: dict[str, float] = field(default_factory=dict)

    def leave_out_alike(self) -> int:
        """Leaves out the groups whose rewards are all alike, which say nothing where responses are compared; how many."""
        rewards: dict[int, set[float]] = {}
        for trajectory in self.trajectories:
            rewards.setdefault(trajectory.group, set()).add(trajectory.reward)
        kept = [i for i, trajectory in enumerate(self.trajectories) if len(rewards[trajectory.group]) > 1]
        self.trajectories = [self.trajectories[i] for i in kept]
        self.problems = [self.problems[i] for i in kept]
        return sum(len(found) == 1 for found in rewards.values())

    def split(self, parts: int) -> list[Collected]:
        """Parts with an equal share of the groups each, for as many steps; the metrics go to the first, which they tell."""
        if parts == 1:
            return [self]
        groups: dict[int, list[Trajectory]] = {}
        for trajectory in self.trajectories:
            groups.setdefault(trajectory.group, []).append(trajectory)
        members = list(groups.values())
        bounds = [part * len(members) // parts for part in range(parts + 1)]
        split = [Collected([t for m in members[a:b] for t in m]) for a, b in pairwise(bounds)]
        split[0].metrics = self.metrics
        return split


def save_collected(folder: Path, waiting: Iterable[Collected]) -> None:
    """Into a new folder; problems are left out."""
    folder.mkdir()
    for number, collected in enumerate(waiting):
        save_trajectories(folder / f"{number:06d}.safetensors", collected.trajectories)
        (folder / f"{number:06d}.json").write_text(json.dumps(collected.metrics))


def load_collected(folder: Path) -> list[Collected]:
    return [
        Collected(load_trajectories(path), metrics=json.loads(path.with_suffix(".json").read_text()))
        for path in sorted(folder.glob("*.safetensors"))
    ]


@dataclass(frozen=True)
class _Answers:
    """To problems drawn at once, of which `left_out` had prompts that were too long."""

    drawn_at: int
    problems: list[Problem]
    prompts: list[list[int]]
    graded: list[Graded]
    left_out: int


class RolloutSource:
    """Draws problems, lets the engine answer them, and grades the answers."""

    def __init__(
        self,
        stream: ProblemStream,
        engine: RolloutEngine,
        chat: Chat,
        config: RolloutConfig,
        seed: int,
        world: World = ALONE,
        steps: int = 0,
    ) -> None:
        self.stream = stream
        self.engine = engine
        self.chat = chat
        self.config = config
        self.seed = seed
        self.world = world
        self.watch: Watch = unwatched
        self.steps = steps
        """Optimiser steps of the run, which reward functions may want to know."""

    @property
    def position(self) -> int:
        return self.stream.position

    @position.setter
    def position(self, position: int) -> None:
        self.stream.position = position

    def save(self, folder: Path, waiting: Iterable[Collected]) -> None:
        """What was collected and `waiting`, into a checkpoint: the weights that made it will be gone."""
        save_collected(folder / WAITING, waiting)

    def restore(self, folder: Path) -> list[Collected]:
        return load_collected(folder / WAITING)

    def collect(self, step: int, phases: Phases) -> Collected:
        """A rollout with the weights of this moment: update `step` is the next."""
        transfer = self.update_weights(step - 1, phases)
        collected = self.roll_out(step, phases)
        collected.metrics |= transfer
        return collected

    def update_weights(self, version: int, phases: Phases) -> dict[str, float]:
        with phases("sync"):
            return self.engine.update_weights(version)

    def roll_out(self, step: int, phases: Phases) -> Collected:
        """A rollout with the weights that the engine has, for update `step` to be the first to train on."""
        config, collected = self.config, Collected([])
        graded: list[Graded] = []
        dropped = left_out = alike = 0
        for draw in range(1 + config.refill):
            missing = config.prompts - len({t.group for t in collected.trajectories})
            if not missing:
                break
            answers = self._answers(missing, step, draw, phases)
            made = self._made(answers)
            graded += answers.graded
            dropped += len(answers.graded) - len(made.trajectories)
            left_out += answers.left_out
            if config.refill:
                alike += made.leave_out_alike()
            collected.problems += made.problems
            collected.trajectories += made.trajectories
        collected.metrics = {
            "correct_share": sum(each.grade.correct for each in graded) / len(graded),
            "ungraded": sum(each.grade.failure is not None for each in graded),
            "dropped": dropped,
            "generated_responses": len(graded),
            "generated_tokens": sum(len(each.response.token_ids) for each in graded),
            **reward_parts(graded),
        }
        if config.max_prompt_tokens:
            collected.metrics["prompts_dropped"] = left_out
        if config.refill:
            collected.metrics["groups_alike"] = alike
        return collected

    def _answers(self, count: int, step: int, draw: int, phases: Phases) -> _Answers:
        """The responses to the next `count` problems; `draw` numbers those of one rollout."""
        config = self.config
        drawn_at = self.position
        with phases("rollout"):
            problems, prompts, left_out = self._draw(count)
            again = (draw,) if draw else ()
            requests = make_requests(prompts, config.samples, "rollout", self.seed, step, *again)
            answers = self.engine.generate(requests, Sampling(config.max_new_tokens, config.temperature), self.watch)
        with phases("reward"):
            progress = Progress(step - 1, self.steps)
            graded = grade_answers(self.stream.task, problems, answers, self.chat, progress, self.world)
        return _Answers(drawn_at, problems, prompts, graded, left_out)

    def _made(self, answers: _Answers) -> Collected:
        """The trajectories of responses, but for those that the config drops."""
        config, collected = self.config, Collected([])
        for each in answers.graded:
            i, response, grade = each.number, each.response, each.grade
            fixed = response.truncated and config.truncated == "fixed"
            if response.truncated and config.truncated == "drop":
                continue
            if grade.failure is not None and config.ungraded == "drop" and not fixed:
                continue
            collected.problems.append(answers.problems[i])
            collected.trajectories.append(
                Trajectory(
                    prompt_ids=answers.prompts[i],
                    response_ids=response.token_ids,
                    reward=config.truncated_reward if fixed else grade.reward,
                    truncated=response.truncated,
                    group=answers.drawn_at + i,
                    weight_version=response.weight_version,
                    behaviour_logprobs=None if response.logprobs is None else torch.tensor(response.logprobs),
                )
            )
        return collected

    def _draw(self, count: int) -> tuple[list[Problem], list[list[int]], int]:
        """The next `count` problems whose prompts are not too long, these prompts, and how many were."""
        problems: list[Problem] = []
        prompts: list[list[int]] = []
        left_out = 0
        while len(problems) < count:
            taken = self.stream.take(count - len(problems))
            kept, encoded = self.chat.encode_problems(taken)
            left_out += len(taken) - len(kept)
            problems += kept
            prompts += encoded
            if left_out > 1000 * (1 + len(problems)):
                raise ValueError(
                    f"rollout.max_prompt_tokens: {self.config.max_prompt_tokens}, and {left_out} of {left_out + len(problems)} "
                    "problems have longer prompts; raise it"
                )
        return problems, prompts, left_out
