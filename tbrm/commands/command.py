"""What a command is, and arguments that several take. Nothing heavy is imported before a command runs: `tbrm --help` must
not wait for torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from tbrm.storage.paths import expand


@dataclass(frozen=True)
class Command:
    """One of `tbrm`: what it is called, takes and does."""

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    """Declares what it takes."""
    run: Callable[[argparse.Namespace], None]
    epilog: str = ""
    of_one_process: bool = False
    """It writes files and divides nothing: several processes would all write the same."""


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=path, help="a YAML file, such as recipes/tiny.yaml")
    overrides(parser, "replaces a key of the recipe")


def model_argument(parser: argparse.ArgumentParser) -> None:
    whence = "a Hugging Face folder, a hub name, or a run's folder (its best checkpoint is taken)"
    parser.add_argument("model", type=path, help=whence)


def overrides(parser: argparse.ArgumentParser, which: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=which)


def path(text: str) -> str:
    """The type of arguments that are paths, or may be."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {number}; wants at least 1")
    return number
