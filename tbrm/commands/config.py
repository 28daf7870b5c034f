"""`tbrm config`."""

from __future__ import annotations

import argparse

from tbrm.commands.command import Command, recipe_arguments
from tbrm.commands.table import table


def run(args: argparse.Namespace) -> None:
    from tbrm.config.recipe import describe, load_config

    config = load_config(args.recipe, args.overrides)
    print(table(describe(type(config), dict(config)), ("key", "value", "meaning")))


CONFIG = Command("config", "Check a recipe and show every key with its value and meaning.", recipe_arguments, run)
