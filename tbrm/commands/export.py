"""`tbrm export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tbrm.commands.command import Command, overrides, path
from tbrm.commands.start import load_libraries


def arguments(parser: argparse.ArgumentParser) -> None:
    source = "a run's folder (its best checkpoint is taken, else its latest), or a checkpoint's"
    parser.add_argument("source", type=path, help=source)
    parser.add_argument("out", type=path, help="the folder to make")
    overrides(parser, "keys of model, such as trust_remote_code")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="data type of the weights (default: as the model's files had them before training)",
    )


def run(args: argparse.Namespace) -> None:
    load_libraries(args.source)
    import torch

    from tbrm.training.export import export

    dtype = getattr(torch, args.dtype) if args.dtype else None
    print(export(args.source, Path(args.out), dtype, args.overrides))


EXPORT = Command(
    "export", "Turn a run's checkpoint into a normal Hugging Face folder.", arguments, run, of_one_process=True
)
