"""Where a run's trajectories come from, as its config says: the policy's own rollouts, or a file of recorded ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from tbrm.chat import Chat
from tbrm.config.schema import Config
from tbrm.config.section import ConfigError
from tbrm.experience.ahead import SupplyAhead
from tbrm.experience.collect import RolloutSource
from tbrm.experience.offline import FileSource, RowReader, read_trajectories
from tbrm.experience.supply import Supply
from tbrm.parallel import World
from tbrm.rollout import RolloutEngine
from tbrm.tasks import Problem, ProblemStream


def trajectory_source(
    config: Config,
    engine: RolloutEngine,
    chat: Chat,
    heldout: Sequence[Problem],
    world: World,
) -> RolloutSource | FileSource:
    """Never deals out a trajectory whose problem is held out. Raises ConfigError if a file holds no other."""
    if config.data.trajectories is None:
        assert config.task is not None  # the config's validation saw to it
        stream = ProblemStream(config.task, config.seed, heldout)
        return RolloutSource(stream, engine, chat, config.rollout, config.seed, world, config.trainer.steps)
    rows = RowReader(chat, config.task, heldout, config.rollout.ungraded)
    path = config.data.trajectories
    # Once for all: what grades a line may draw, or ask somebody.
    usable = world.on_main(lambda: read_trajectories(path, rows))
    for count in rows.counts():  # of the main process
        print(f"data.trajectories: {count}", file=sys.stderr)
    if not usable:
        raise ConfigError(
            f"data.trajectories: every problem of {config.data.trajectories} is held out for evaluation, or could not be graded"
        )
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
