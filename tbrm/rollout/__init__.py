"""Rollouts: engines that turn prompts into responses, and what collects graded trajectories with them."""

from tbrm.rollout.base import Response, RolloutEngine, Sampling
from tbrm.rollout.embedded import EmbeddedEngine
from tbrm.rollout.engines import make_engine

__all__ = ["EmbeddedEngine", "Response", "RolloutEngine", "Sampling", "make_engine"]
