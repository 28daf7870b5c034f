"""`tbrm train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tbrm.commands.command import Command, recipe_arguments
from tbrm.commands.start import load_libraries, processes
from tbrm.commands.table import table


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    fate = parser.add_mutually_exclusive_group()
    fate.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, if it has one")
    fate.add_argument("--overwrite", action="store_true", help="delete what run.dir holds and start afresh")
    anyway = "as --resume, though the recipe makes another run of it"
    parser.add_argument("--resume-anyway", action="store_true", help=anyway)
    parser.add_argument("-h", "--help", nargs=0, action=_HelpWithKeys, help="show this help and every key of a recipe")


def run(args: argparse.Namespace) -> None:
    from tbrm.config.recipe import load_config
    from tbrm.config.section import ConfigError

    if args.overwrite and args.resume_anyway:
        raise ConfigError("--overwrite and --resume-anyway: one deletes what the other goes on with; give one of them")
    config = load_config(args.recipe, args.overrides)
    resume = args.resume or args.resume_anyway
    load_libraries(config.model.name)
    from tbrm.training.resume import nothing_left
    from tbrm.training.run_lock import RunLock
    from tbrm.training.run_writer import prepare_run_dir
    from tbrm.training.trainer import Trainer

    run_dir = Path(config.run.dir)

    def prepare() -> str | None:
        prepare_run_dir(run_dir, resume=resume, overwrite=args.overwrite)
        return nothing_left(config, anyway=args.resume_anyway) if resume else None

    fate = {"resume": resume, "resume-anyway": args.resume_anyway, "overwrite": args.overwrite}
    with processes(config, **fate) as world, RunLock(run_dir, world, resume=resume):
        finished = world.on_main(prepare)
        if not finished:
            Trainer(config, resume=resume, anyway=args.resume_anyway, world=world).train()
        if world.is_main:
            print(finished or f"{config.run.dir} holds the run; `tbrm report {config.run.dir}` makes a page of it")


class _HelpWithKeys(argparse.Action):
    """`--help` that also lists every key of a recipe; the list is made only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from tbrm.config.recipe import describe

        parser.print_help()
        print(
            "\nkeys of a recipe (every one may be overridden; `tbrm config RECIPE` adds those of its task and objective):"
        )
        print(table(describe(), ("key", "default", "meaning")))
        parser.exit()


TRAIN = Command("train", "Train a model as a recipe says.", arguments, run)
