"""The engine that a recipe names."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

from tbrm.chat import Chat
from tbrm.config.rollout import RolloutConfig
from tbrm.config.section import ConfigError
from tbrm.parallel import ALONE, World
from tbrm.policy.model import PolicyModel
from tbrm.rollout.embedded import EmbeddedEngine
from tbrm.rollout.frozen import FrozenEngine
from tbrm.rollout.interface import RolloutEngine
from tbrm.rollout.own_cache import OwnCacheEngine
from tbrm.rollout.split import SplitEngine


def make_engine(
    config: RolloutConfig,
    policy: PolicyModel,
    chat: Chat,
    world: World = ALONE,
    *,
    run_dir: Path = Path(),
) -> RolloutEngine:
    """`rollout.engine` for the policy; of several processes each answers its share of the prompts. What servers say goes to
    a folder of `run_dir`. Raises ConfigError or ModuleNotFoundError."""
    if world.is_main:
        print(chat.said, file=sys.stderr)
    if config.max_staleness:
        chat = copy.deepcopy(chat)  # a tokenizer is not for two threads

    def embedded(model: PolicyModel) -> RolloutEngine:
        return (OwnCacheEngine if model.in_rows else EmbeddedEngine)(model, chat, config.batch_size)

    engine: RolloutEngine
    if config.engine == "vllm":
        from tbrm.rollout.vllm.engine import VllmEngine

        engine = VllmEngine(config, policy, chat, run_dir / "engine", world)
    elif config.engine == "vllm_colocated":
        from tbrm.rollout.vllm.colocated import ColocatedEngine

        if world.mesh is not None:
            raise ConfigError("rollout.engine: vllm_colocated wants one process, without torchrun; use vllm")
        engine = ColocatedEngine(config, policy, chat)
    elif config.max_staleness:
        engine = FrozenEngine(policy, embedded)
    else:
        engine = embedded(policy)
    return SplitEngine(engine, world)
