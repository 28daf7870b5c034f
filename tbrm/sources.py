"""Where a run's trajectories come from, as its config says: the policy's own rollouts, or a file of recorded ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from tbrm.chat import encode_problems
from tbrm.config import Config, ConfigError
from tbrm.offline import FileSource, read_trajectories, without_prompts
from tbrm.parallel import World
from tbrm.rollout import RolloutEngine
from tbrm.rollout.ahead import SupplyAhead
from tbrm.rollout.collect import RolloutSource
from tbrm.supply import Supply
from tbrm.tasks import Problem, ProblemStream


def trajectory_source(
    config: Config,
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[Problem],
    world: World,
) -> RolloutSource | FileSource:
    """Never deals out a trajectory whose problem is held out. Raises ConfigError if a file holds no other."""
    if config.data.trajectories is None:
        assert config.task is not None  # the config's validation saw to it
        stream = ProblemStream(config.task, config.seed, heldout)
        return RolloutSource(stream, engine, tokenizer, config.rollout, config.seed, world, config.trainer.steps)
    recorded = read_trajectories(config.data.trajectories, tokenizer, engine.eos_ids, config.task)
    usable = without_prompts(recorded, encode_problems(tokenizer, heldout))
    if not usable:
        raise ConfigError(f"data.trajectories: every prompt of {config.data.trajectories} is held out for evaluation")
    if len(usable) < len(recorded) and world.is_main:
        left_out = len(recorded) - len(usable)
        print(f"data.trajectories: {left_out} of {len(recorded)} left out: their prompts are held out", file=sys.stderr)
    if (key := config.objective.wants_several_responses) and len({t.group for t in usable}) == len(usable):
        raise ConfigError(
            f"objective.{key} is true but {config.data.trajectories} has one response to each prompt: less its own mean, every "
            "reward would be 0; set it to false"
        )
    return FileSource(usable, config.rollout, config.seed)


def make_supply(source: RolloutSource | FileSource, config: Config, optimizer: torch.optim.Optimizer) -> Supply:
    """What deals `source` out to the optimiser's steps: collected when a step wants it, or ahead of it."""
    if not config.rollout.max_staleness:
        return Supply(source, config.rollout.updates)
    assert isinstance(source, RolloutSource)  # the config's validation saw to it
    return SupplyAhead(source, config.rollout, config.trainer.steps, optimizer)
