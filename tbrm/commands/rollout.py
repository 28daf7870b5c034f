"""`tbrm rollout`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tbrm.commands.command import Command, path, recipe_arguments
from tbrm.commands.start import load_libraries, processes, read_config, require_model


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="the JSON lines file to write")
    steps = "batches of rollout.prompts problems to answer (default 1)"
    parser.add_argument("--steps", type=int, default=1, help=steps)


def run(args: argparse.Namespace) -> None:
    config = read_config(args)
    require_model(config.model)
    load_libraries(config.model.name)
    from tbrm.experience.record import record

    with processes(config, steps=args.steps) as world:
        written = record(config, Path(args.out), args.steps, world)
        if world.is_main:
            print(f"{written} trajectories written to {args.out}; train on them with data.trajectories={args.out}")


ROLLOUT = Command(
    "rollout",
    "Record graded rollouts of a recipe's model, for offline training (data.trajectories).",
    arguments,
    run,
)
