"""Checkpoints: written by all processes together, complete or not there at all, and resumed by any number of processes.

``checkpoints/step-000010/`` holds the weights (safetensors, in the slices of the processes that wrote them; those of one
process are a Hugging Face folder as they are, and `tbrm export` makes one of any; of a model with LoRA adapters these alone, as
peft saves them), and in ``trainer/`` the optimiser, the reference once it was reset, the trajectories that wait for their
step, or the scores of recorded ones (all safetensors), the counters (JSON) and the replay buffer (see replay.py). All
randomness is derived from the seed and the counters. ``manifest.json`` holds the hash of every file. ``latest`` and ``best``
are links.

A folder is written under another name and renamed when complete, and only then linked, so a kill never leaves half a
checkpoint under a good name. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbrm.parallel import ALONE, World
from tbrm.storage.kept import Kept
from tbrm.storage.names import path_within

FORMAT = 3
TRAINER = "trainer"
STATE = f"{TRAINER}/state.json"
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or resumed; the message names it, and what can be done."""


@dataclass
class TrainerState:
    """The counters of a run."""

    step: int = 0
    day: str = ""
    """That on which the run began, which chat templates may name; "" in a checkpoint of an earlier version."""
    position: int = 0
    """Of the source of trajectories."""
    recorded: dict[str, list[int]] = field(default_factory=dict)
    """The position in the files of recorded trajectories."""
    resolved: dict[str, str] = field(default_factory=dict)
    """What the recipe's words came to (see resolved.py); {} in a checkpoint of an earlier version."""
    auto: dict[str, float] = field(default_factory=dict)
    """What `auto` in the objective came to (see auto.py)."""
    reference_version: int = 0
    skipped_in_a_row: int = 0
    """Steps whose loss or gradient was not finite, up to this one."""
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    best_accuracy: float | None = None
    reward_before: float | None = None
    """Mean reward of held-out problems: what decides where accuracies are equal."""
    reward_after: float | None = None
    best_reward: float | None = None
    seconds_training: float = 0.0


def latest_folder(run_dir: Path) -> Path | None:
    """The checkpoint that a run goes on from: where `latest` leads or, where that is nowhere (a copy has lost its links, the
    newest one was deleted), the newest that there is. Under its name each is complete."""
    checkpoints = run_dir / "checkpoints"
    if (checkpoints / "latest").exists():
        return (checkpoints / "latest").resolve()
    return max((folder.resolve() for folder in checkpoints.glob("step-*")), default=None)


def latest_step(run_dir: Path) -> int | None:
    """That of a run's latest checkpoint, which is not checked; None if there is none, or it does not say."""
    folder = latest_folder(run_dir)
    return None if folder is None else step_of(folder)


def step_of(folder: Path) -> int | None:
    """That of a checkpoint, which is not checked; None if it does not say."""
    try:
        step = json.loads((folder / STATE).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


class Checkpoint:
    """One on disk, whose files are what its manifest says. Raises CheckpointError where they are not."""

    def __init__(self, folder: Path, world: World = ALONE) -> None:
        self.folder = folder
        try:
            self.state = _checked_state(folder, world)
        except _WRONG as error:
            way_out = "There is no good one before it: train again with --overwrite"
            if before := _good_one_before(folder, world):
                link = folder.parent / "latest"
                way_out = f"Go on from the one before: `ln -sfn {before.name} {link}`, then --resume"
            raise CheckpointError(f"checkpoint {folder} cannot be resumed: {error}. {way_out}") from error

    def restore(self, kept: Mapping[str, Kept]) -> None:
        """Gives each part what was saved of it; see `Checkpoints.save`."""
        for folder, part in kept.items():
            part.restore(self.folder / folder)


_WRONG = (OSError, ValueError, TypeError, KeyError, AttributeError)
"""What reading a folder that is no whole checkpoint of this version may raise."""


def _checked_state(folder: Path, world: World) -> TrainerState:
    # Read once for all: a process whose file system is late would leave the others waiting.
    values, manifest = world.on_main(lambda: _read_state(folder))
    names = list(map(path_within, manifest))
    damaged = world.split(lambda names: [_check(folder, name, manifest[name]) for name in names], names)
    if any(damaged):
        raise ValueError("; ".join(filter(None, damaged)))
    return TrainerState(**values)


def _read_state(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The counters and the manifest."""
    values = json.loads((folder / STATE).read_text())
    found = values.pop("format")
    if found != FORMAT:
        raise ValueError(f"state.json: format {found!r}, this version reads {FORMAT}")
    return values, json.loads((folder / MANIFEST).read_text())


def _good_one_before(folder: Path, world: World) -> Path | None:
    earlier = sorted(other for other in folder.parent.glob("step-*") if other.name < folder.name)
    for other in reversed(world.gather(earlier)[0]):  # all processes look at the same ones
        try:
            _checked_state(other, world)
        except _WRONG:
            continue
        return other
    return None


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(folder: Path, name: str, wanted: str) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    return None if hash_of(path) == wanted else f"{name} is damaged: its hash is not that of {MANIFEST}"
