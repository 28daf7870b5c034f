"""`tbrm config`."""

from __future__ import annotations

import argparse
import sys

from tbrm.commands.command import Command, recipe_arguments
from tbrm.commands.table import table


def run(args: argparse.Namespace) -> None:
    from tbrm.config.foreseen import notes, refuse_foreseen
    from tbrm.config.recipe import describe, load_config

    config = load_config(args.recipe, args.overrides)
    print(table(describe(type(config), dict(config)), ("key", "value", "meaning")), flush=True)
    for note in notes(config):
        print(note, file=sys.stderr)
    refuse_foreseen(config)


CONFIG = Command(
    "config",
    "Check a recipe and show every key with its value and meaning, and what `tbrm train` would refuse here.",
    recipe_arguments,
    run,
)
