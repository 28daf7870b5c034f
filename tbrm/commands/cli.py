"""`tbrm`: finds the command that is meant, runs it, and shows what its errors say."""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from tbrm import __version__
from tbrm.commands.command import Command
from tbrm.commands.compare import COMPARE
from tbrm.commands.config import CONFIG
from tbrm.commands.doctor import DOCTOR
from tbrm.commands.eval import EVAL
from tbrm.commands.export import EXPORT
from tbrm.commands.import_gguf import IMPORT_GGUF
from tbrm.commands.plan import PLAN
from tbrm.commands.report import REPORT
from tbrm.commands.rollout import ROLLOUT
from tbrm.commands.score import SCORE
from tbrm.commands.train import TRAIN
from tbrm.processes.place import refuse_several

COMMANDS = (TRAIN, CONFIG, PLAN, EVAL, SCORE, ROLLOUT, DOCTOR, REPORT, COMPARE, EXPORT, IMPORT_GGUF)


INTERRUPTED = 130
UNREAD = 141
"""Exit codes of a shell's commands that SIGINT, or SIGPIPE, has ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ntbrm: stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _leave_unread():
            raise
        return UNREAD


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse ends a list of positionals at the first option; overrides after one are still overrides.
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    command: Command = args.command
    try:
        from tbrm import needs_train  # noqa: F401

        if command.of_one_process:
            refuse_several(f"tbrm {command.name}")
        command.run(args)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _leave_unread():
            return UNREAD
        if not _explains_itself(error):
            raise
        if getattr(args, "debug", False):
            traceback.print_exc()
        elif hasattr(error, "own_traceback"):  # an exception of code of the user's own
            print(error.own_traceback, file=sys.stderr)
        print(f"tbrm {command.name}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


def _leave_unread() -> bool:
    """Whether nobody reads what is printed any more, as after `| head`; from now on it goes nowhere."""
    pipes = select.poll()
    pipes.register(1, 0)
    pipes.register(2, 0)
    gone = [number for number, event in pipes.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for number in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(gone)


def _explains_itself(error: Exception) -> bool:
    """What our own code raises does, and a traceback would hide it. Anything else is a bug to be seen. A full disk, a folder
    that may not be written: not ours to mend, and a traceback would not help. A signal, too."""
    if isinstance(error, OSError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])
    return ours and isinstance(error, ValueError | ModuleNotFoundError | ArithmeticError | RuntimeError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tbrm",
        description="Trains language models by Trajectory Bellman Residual Minimization (arXiv 2505.15311).",
    )
    parser.add_argument("--version", action="version", version=f"tbrm {__version__}")
    _debug_argument(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            conflict_handler="resolve",  # a command may have a --help of its own
        )
        sub.set_defaults(command=command)
        _debug_argument(sub)
        command.arguments(sub)
    return parser


def _debug_argument(parser: argparse.ArgumentParser) -> None:
    whence = "show where an error came from, in full"
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=whence)
