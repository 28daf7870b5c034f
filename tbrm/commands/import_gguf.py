"""`tbrm import-gguf`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tbrm.commands.command import Command, path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path, help="a .gguf file of an architecture that transformers reads")
    parser.add_argument("out", type=path, help="the folder to make")


def run(args: argparse.Namespace) -> None:
    from tbrm.policy.gguf import import_gguf

    import_gguf(Path(args.file), Path(args.out))
    print(f"{args.out} is ready: model.name={args.out}")


IMPORT_GGUF = Command(
    "import-gguf", "Turn a GGUF file into a normal Hugging Face folder.", arguments, run, of_one_process=True
)
