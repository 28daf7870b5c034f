"""`tbrm report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tbrm.commands.command import Command, path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, help="the run's folder, such as runs/demo")


def run(args: argparse.Namespace) -> None:
    from tbrm.reporting.page import write_report
    from tbrm.reporting.summary import print_summary

    run_dir = Path(args.run)
    print_summary(run_dir, str(write_report(run_dir)))


REPORT = Command(
    "report",
    "Write a run's report.html and plots; works on a running or killed run too.",
    arguments,
    run,
    of_one_process=True,
)
