"""What commands do before their work: libraries, the other processes, and the checkpoint that a run's folder stands for."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tbrm.processes.place import find_place

if TYPE_CHECKING:
    from tbrm.config.model import ModelConfig
    from tbrm.config.schema import Config
    from tbrm.parallel import World


def _speaks() -> bool:
    """Whether this process is the one that talks to the user."""
    place = find_place()
    return place is None or place.rank == 0


def read_config(args: argparse.Namespace) -> Config:
    """That of the recipe and its overrides. Its task takes a second or two: it reads its files, or makes a first problem."""
    from tbrm.config.recipe import load_config
    from tbrm.reporting.progress import alive

    with alive(f"reading {args.recipe}", shown=_speaks()):
        return load_config(args.recipe, args.overrides)


def require_model(config: ModelConfig) -> None:
    """Raises ConfigError where the model is not there: before anything heavy is loaded."""
    from tbrm.policy.hub import require_hub

    config.refuse_given()
    config.require_folder()
    require_hub(config)


def load_libraries(model: str) -> None:
    """Says so first, once, for it takes many seconds. Then only errors of transformers: its bars and notices would break the
    progress bar. And that one process saves alone is what is meant."""
    from tbrm.reporting.progress import alive

    if _speaks():
        print(f"loading torch, transformers and {model}", file=sys.stderr, flush=True)
    with alive("loading", shown=_speaks()):
        import transformers

    warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def processes(config: Config, **command: object) -> Iterator[World]:
    """Those that a launcher started, once they are known to have been told the same; or this one alone."""
    from tbrm.processes.launch import launched
    from tbrm.training.agreement import facts_of, require_agreement

    with launched(config.model, config.parallel) as world:
        require_agreement(world, lambda: facts_of(config, command))
        yield world


def run_of(model: str) -> Path | None:
    """The run whose folder the model is, or whose checkpoint; None if it is neither."""
    folder = Path(model)
    if folder.resolve().parent.name == "checkpoints":
        folder = folder.resolve().parents[1]
    return folder if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file() else None


def of_checkpoint(config: Config) -> Config:
    """The config with the checkpoint that a run's folder stands for as its model, which is said."""
    from tbrm.policy.load import find_model

    name, taken = find_model(config.model.name)
    if name != config.model.name and _speaks():
        print(f"takes {taken}", file=sys.stderr)
    return config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
