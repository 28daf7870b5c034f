"""Where trajectories come from: a model's own rollouts, recorded ones, and those that are replayed."""
