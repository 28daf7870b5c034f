"""Steps that were skipped, since their loss or gradient was not finite: when to give up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tbrm.experience.offline import write_trajectories
from tbrm.parallel import World
from tbrm.trajectories.trajectory import Trajectory


def give_up(
    run_dir: Path,
    step: int,
    in_a_row: int,
    trajectories: Sequence[Trajectory],
    means: Mapping[str, float],
    world: World,
) -> None:
    """Writes down what the last of too many in a row was made of. Raises FloatingPointError."""
    path = run_dir / f"skipped-step-{step:06d}.jsonl"
    if world.is_main:
        write_trajectories(path, trajectories)
    raise FloatingPointError(
        f"step {step}: the loss is {means['loss']} and the gradient norm {means['grad_norm']}, step number {in_a_row} in a row "
        f"that had to be skipped (trainer.max_skipped); its trajectories are in {path}. Lower optim.learning_rate or raise "
        "objective.beta, and continue from the last checkpoint with --resume"
    )
