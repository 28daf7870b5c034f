"""Rollouts: engines that turn prompts into responses, and the evaluation that asks them."""

from tbrm import needs_train  # noqa: F401
from tbrm.rollout.embedded import EmbeddedEngine
from tbrm.rollout.engines import make_engine
from tbrm.rollout.interface import Request, Response, RolloutEngine, Sampling, make_requests

__all__ = ["EmbeddedEngine", "Request", "Response", "RolloutEngine", "Sampling", "make_engine", "make_requests"]
