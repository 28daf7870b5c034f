"""`tbrm plan`."""

from __future__ import annotations

import argparse
import json

from tbrm.commands.command import Command, at_least_one, recipe_arguments
from tbrm.commands.start import load_libraries, read_config, require_model
from tbrm.commands.table import table


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--gpus", type=at_least_one, default=1, help="processes, each with a GPU (default 1)")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of each; without it nothing is said of what fits"
    )
    parser.add_argument("--json", action="store_true", help="print bytes, as JSON for programs")


def run(args: argparse.Namespace) -> None:
    config = read_config(args)
    require_model(config.model)
    load_libraries(f"the shapes of {config.model.name}")
    from tbrm.plan import PHASES, make_plan
    from tbrm.plan.report import GIB, as_dict, rows, sentences

    planned = make_plan(config, args.gpus)
    memory = None if args.gpu_memory is None else args.gpu_memory * GIB
    if args.json:
        print(json.dumps(as_dict(planned, memory), indent=2))
        return
    print(table(rows(planned), ("GiB in each process", *PHASES)))
    print("\n" + "\n".join(sentences(planned, memory)))


PLAN = Command(
    "plan",
    "Say how much memory a recipe will take in each process, and what to change where that is too much.",
    arguments,
    run,
    epilog="Plans for GPUs, on a machine without any too; model.device=cpu plans for processes on CPUs. No weight is read."
    "\n\nexample:\n  tbrm plan recipes/demo.yaml --gpus 8 --gpu-memory 80 trainer.batch_tokens=65536",
)
