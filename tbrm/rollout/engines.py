"""The engine that a recipe names."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from tbrm.config import RolloutConfig
from tbrm.model import PolicyModel
from tbrm.parallel import ALONE, World
from tbrm.rollout.base import RolloutEngine
from tbrm.rollout.embedded import EmbeddedEngine
from tbrm.rollout.frozen import FrozenEngine
from tbrm.rollout.split import SplitEngine


def make_engine(
    config: RolloutConfig, policy: PolicyModel, tokenizer: PreTrainedTokenizerBase, world: World = ALONE
) -> RolloutEngine:
    """`rollout.engine` for the policy; of several processes each answers its share of the prompts."""

    def embedded(model: PolicyModel) -> EmbeddedEngine:
        return EmbeddedEngine(model, tokenizer, config.batch_size)

    if config.max_staleness:
        return FrozenEngine(policy, embedded)
    return SplitEngine(embedded(policy), world)
