"""Rollouts: engines that turn prompts into responses, and what collects graded trajectories with them."""

from tbrm.rollout.base import Response, RolloutEngine, Sampling
from tbrm.rollout.embedded import EmbeddedEngine

__all__ = ["EmbeddedEngine", "Response", "RolloutEngine", "Sampling"]
