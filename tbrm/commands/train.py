"""`tbrm train`, and `tbrm.train`, which it calls."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbrm.commands.command import Command, recipe_arguments
from tbrm.commands.start import load_libraries, processes, read_config
from tbrm.commands.table import table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tbrm.config.schema import Config
    from tbrm.objectives import Objective
    from tbrm.tasks import Task
    from tbrm.training.callbacks import Callback


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    fate = parser.add_mutually_exclusive_group()
    fate.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, if it has one")
    fate.add_argument("--overwrite", action="store_true", help="delete what run.dir holds and start afresh")
    anyway = "as --resume, though the recipe makes another run of it"
    parser.add_argument("--resume-anyway", action="store_true", help=anyway)
    parser.add_argument("-h", "--help", nargs=0, action=_HelpWithKeys, help="show this help and every key of a recipe")


def run(args: argparse.Namespace) -> None:
    from tbrm.config.foreseen import refuse_foreseen
    from tbrm.policy.hub import require_hub
    from tbrm.training.run_dir import refuse_another_run

    config = read_config(args)
    refuse_foreseen(config)
    if not (args.resume or args.resume_anyway or args.overwrite):
        refuse_another_run(Path(config.run.dir))
    require_hub(config.model)
    load_libraries(config.model.name)
    train(config, resume=args.resume, resume_anyway=args.resume_anyway, overwrite=args.overwrite)


def train(
    config: Config,
    *,
    task: Task | None = None,
    objective: Objective | None = None,
    reward: Callable[..., Any] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    resume_anyway: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains as the config says; returns what result.json holds. Under a launcher every process calls it.

    `task` and `objective` replace those of the config. `reward`, a function with the signature of TRL's reward functions, is
    for a task.verifier, and `model`, which is trained in place, with its `tokenizer` for a model.name that are `given`. What is
    in the run's folder is kept, gone on with or deleted as by `tbrm train`. Raises ConfigError; Interrupted after a signal,
    with the step saved.
    """
    from tbrm.config.section import ConfigError
    from tbrm.policy.given import lent
    from tbrm.training.given import check_objects, with_objects
    from tbrm.training.resume import nothing_left
    from tbrm.training.run_dir import prepare_run_dir
    from tbrm.training.run_lock import RunLock
    from tbrm.training.trainer import Trainer

    going_on = resume or resume_anyway
    if overwrite and going_on:
        raise ConfigError("overwrite and resume: one deletes what the other goes on with; give one of them")
    config = with_objects(config, task=task, objective=objective, reward=reward)
    check_objects(config, model, tokenizer, callbacks)  # before anything is deleted
    run_dir = Path(config.run.dir)

    def prepare() -> str | None:
        prepare_run_dir(run_dir, resume=going_on, overwrite=overwrite)
        return nothing_left(config, anyway=resume_anyway) if going_on else None

    fate = {"resume": going_on, "resume-anyway": resume_anyway, "overwrite": overwrite}
    with processes(config, **fate) as world, RunLock(run_dir, world, resume=going_on), lent(model):
        finished = world.on_main(prepare)
        if finished:
            result = world.on_main(lambda: json.loads((run_dir / "result.json").read_text()))
        else:
            trainer = Trainer(
                config,
                model=model,
                tokenizer=tokenizer,
                callbacks=callbacks,
                resume=going_on,
                anyway=resume_anyway,
                world=world,
            )
            result = trainer.train()
        if finished and world.is_main:
            print(finished)
    return dict(result)


class _HelpWithKeys(argparse.Action):
    """`--help` that also lists every key of a recipe; the list is made only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        try:
            from tbrm.config.recipe import describe
        except ModuleNotFoundError as error:  # no main() has begun a command that would show it
            parser.exit(1, f"{parser.prog}: {error}\n")

        print(
            "\nkeys of a recipe (every one may be overridden; `tbrm config RECIPE` adds those of its task and objective):"
        )
        print(table(describe(), ("key", "default", "meaning")))
        parser.exit()


TRAIN = Command("train", "Train a model as a recipe says.", arguments, run)
