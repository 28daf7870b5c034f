"""`tbrm rollout`: graded rollouts as JSON lines, for training on them later."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from tbrm.chat import decode
from tbrm.config import Config, ConfigError
from tbrm.load import load_policy
from tbrm.metrics import Phases
from tbrm.rollout.collect import RolloutSource
from tbrm.rollout.engines import make_engine
from tbrm.tasks import ProblemStream


def record(config: Config, out: Path, steps: int) -> int:
    """Writes the trajectories of `steps` batches of the recipe's rollouts; returns how many. The problems are those of
    the training stream: held-out ones are left out."""
    if config.task is None:
        raise ConfigError("task: missing; rollouts need problems to answer")
    policy, tokenizer = load_policy(config)
    engine = make_engine(config.rollout, policy, tokenizer, run_dir=Path(config.run.dir))
    stream = ProblemStream(config.task, config.seed, config.task.heldout(config.evaluation.prompts))
    source = RolloutSource(stream, engine, tokenizer, config.rollout, config.seed)
    phases = Phases(policy.device)
    written = 0
    with closing(engine), out.open("w") as file:
        for step in tqdm(range(1, steps + 1), disable=None, desc="rollout", unit="batch"):
            collected = source.collect(step, phases)
            for problem, trajectory in zip(collected.problems, collected.trajectories, strict=True):
                row = {
                    "messages": problem.messages,
                    "response": decode(tokenizer, trajectory.response_ids),
                    "reward": trajectory.reward,
                    "truncated": trajectory.truncated,
                    "answer": problem.answer,
                    "temperature": config.rollout.temperature,
                    "prompt_ids": trajectory.prompt_ids,
                    "response_ids": trajectory.response_ids,
                }
                file.write(json.dumps(row) + "\n")
                written += 1
    return written
