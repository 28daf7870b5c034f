"""Where trajectories come from: a model's own rollouts, recorded ones, and those that are replayed."""

from tbrm import needs_train  # noqa: F401
