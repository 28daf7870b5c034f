"""`tbrm rollout`: graded rollouts as JSON lines, for training on them later."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from tbrm.chat import Chat, make_chat
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.experience.collect import Collected, RolloutSource
from tbrm.experience.offline import token_columns
from tbrm.parallel import ALONE, World
from tbrm.policy.load import load_policy
from tbrm.reporting.metrics import Phases
from tbrm.reporting.progress import alive
from tbrm.rollout.engines import make_engine
from tbrm.tasks import ProblemStream


def record(config: Config, out: Path, steps: int, world: World = ALONE) -> int:
    """Writes the trajectories of `steps` batches of the recipe's rollouts; returns how many. The problems are those of
    the training stream: held-out ones are left out. Each process of `world` answers its share, and the main one writes."""
    if config.task is None:
        raise ConfigError("task: missing; rollouts need problems to answer")
    policy, tokenizer = load_policy(config, world)
    chat = make_chat(config, policy.lm, tokenizer)
    for note in config.task.notes() if world.is_main else []:
        print(note, file=sys.stderr)
    engine = make_engine(config.rollout, policy, chat, world, run_dir=Path(config.run.dir))
    stream = ProblemStream(config.task, config.seed, config.task.withheld(config.evaluation.prompts))
    source = RolloutSource(stream, engine, chat, config.rollout, config.seed, world)
    phases = Phases(policy.device)
    written = 0
    responses = steps * config.rollout.prompts * config.rollout.samples
    with (
        closing(engine),
        out.open("w") if world.is_main else nullcontext() as file,
        alive("rollout", responses, shown=world.is_main) as source.watch,
    ):
        for step in range(1, steps + 1):
            collected = source.collect(step, phases)
            written += len(collected.trajectories)
            if file is not None:
                file.writelines(json.dumps(row, default=str) + "\n" for row in _rows(collected, chat, config))
    return written


def _rows(collected: Collected, chat: Chat, config: Config) -> Iterator[dict[str, Any]]:
    for problem, trajectory in zip(collected.problems, collected.trajectories, strict=True):
        yield {
            "messages": problem.messages,
            **({"tools": problem.tools} if problem.tools else {}),
            "response": chat.decode(trajectory.response_ids),
            "reward": trajectory.reward,
            "truncated": trajectory.truncated,
            "answer": problem.answer,
            "entry": problem.entry,
            "temperature": config.rollout.temperature,
            **token_columns(trajectory),
        }
