"""A run's folder before the run: what of an earlier one is in it, and what becomes of that. Imports no torch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tbrm.config.section import ConfigError
from tbrm.storage.run_files import RUN_FILES


def prepare_run_dir(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Sees to it that no earlier run is lost unasked. Raises ConfigError."""
    if overwrite:
        _clear(run_dir)
    elif not resume:
        refuse_another_run(run_dir)
        if (run_dir / "metrics.jsonl").exists():
            _clear(run_dir)
            print(
                f"{run_dir} held a run that had ended before its first step was done: it is begun anew", file=sys.stderr
            )


def refuse_another_run(run_dir: Path) -> None:
    """Raises ConfigError where the folder holds what another run would overwrite: a step that is done, or a checkpoint."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return
    if b"\n" in metrics.read_bytes() or any((run_dir / "checkpoints").glob("step-*")):
        raise ConfigError(
            f"run.dir: {str(run_dir)!r} holds a run already; give --resume to go on with it, --overwrite to delete it (of "
            "tbrm.train, resume=True or overwrite=True), or another run.dir"
        )


def _clear(run_dir: Path) -> None:
    """Deletes only what a run writes: run.dir may be a folder that holds other things too."""
    for name in RUN_FILES:
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
