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
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from transformers import PreTrainedTokenizerBase

from tbrm.config.training import CheckpointConfig
from tbrm.experience.replay import ReplayBuffer
from tbrm.experience.supply import Supply
from tbrm.parallel import ALONE, World
from tbrm.policy.hub_folder import save_config, save_tokenizer
from tbrm.policy.lora import WEIGHTS as ADAPTERS
from tbrm.policy.model import PolicyModel
from tbrm.policy.reference import ReferenceModel
from tbrm.policy.weights import read_weights, stored_tensors, whole
from tbrm.storage.files import Discards, lacks_room, save_tensors
from tbrm.storage.names import path_within

FORMAT = 3
_UNFINISHED = ".writing-"
_TRAINER = "trainer"
_OPTIMIZER, _REFERENCE, _STATE, _REPLAY = (
    f"{_TRAINER}/{name}" for name in ("optimizer", "reference", "state.json", "replay")
)
_MANIFEST = "manifest.json"


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


class Checkpoints:
    """The checkpoints of one run. Leaving its context waits for one that is still being written."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, world: World) -> None:
        self.folder = run_dir / "checkpoints"
        self.config = config
        self.world = world
        # With a group of its own, since a checkpoint may be written while training uses the other.
        self._beside = world.apart()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._discards = Discards(self.folder)

    def latest(self) -> Checkpoint | None:
        """The latest one, checked. Raises CheckpointError if it is damaged or not one of this version."""
        # All processes must go on from the same one, whatever their file systems say.
        target = self.world.on_main(lambda: latest_folder(self.folder.parent))
        return None if target is None else Checkpoint(target, self.world)

    def save(
        self,
        state: TrainerState,
        policy: PolicyModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        reference: ReferenceModel,
        replay: ReplayBuffer,
        supply: Supply,
        *,
        best: bool,
    ) -> None:
        """Raises CheckpointError if this one, or the one before, could not be written."""
        self.wait()
        name = f"step-{state.step:06d}"
        writing = self.folder / f"{_UNFINISHED}{name}"
        tensors = {_OPTIMIZER: _optimizer_tensors(policy, optimizer)}
        adapters = {}
        if policy.adapters is None:
            tensors["."] = _detached(policy.saved_weights())
        else:
            adapters = {name: whole(tensor) for name, tensor in _detached(policy.saved_weights()).items()}
        if reference.moved:
            tensors[_REFERENCE] = _detached(reference.model.weights())

        def begin() -> dict[str, str]:
            """Of what the main process writes; returns the hashes of files that need not be read for it."""
            with self._explained(name):
                self._discards.discard(writing)
                (writing / _TRAINER).mkdir(parents=True)
                save_config(policy.lm, writing)
                save_tokenizer(tokenizer, writing)
                if policy.adapters is not None:
                    policy.adapters.save(writing, adapters)
                supply.save(writing / _TRAINER)
                values = {"format": FORMAT, **asdict(state)}
                (writing / _STATE).write_text(json.dumps(values, indent=2) + "\n")
                return {f"{_REPLAY}/{file}": digest for file, digest in replay.save(writing / _REPLAY).items()}

        hashes = self.world.on_main(begin)
        if self.config.asynchronous:
            staged = BlockingAsyncStager().stage(tensors)
            self._pending = self._writer.submit(self._write, staged, writing, name, best, hashes)
        else:
            self._write(tensors, writing, name, best, hashes)

    def wait(self) -> None:
        """Until the last checkpoint is complete. Raises CheckpointError if it could not be written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(
        self, tensors: dict[str, dict[str, Tensor]], writing: Path, name: str, best: bool, hashes: dict[str, str]
    ) -> None:
        with self._explained(name):
            for folder, named in tensors.items():
                if named:
                    path = writing / folder
                    path.mkdir(exist_ok=True)
                    self._write_tensors(named, path)
        self._beside.on_main(lambda: self._finish(writing, name, best, hashes))

    def _finish(self, writing: Path, name: str, best: bool, hashes: dict[str, str]) -> None:
        with self._explained(name):
            names = (str(path.relative_to(writing)) for path in _files(writing))
            manifest = {name: hashes.get(name) or _hash(writing / name) for name in names}
            (writing / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            final = self.folder / name
            self._discards.discard(final)  # the same step, saved before a resume
            writing.rename(final)
            self._link("latest", name)
            if best:
                self._link("best", name)
            self._delete_old()

    def _write_tensors(self, tensors: dict[str, Tensor], folder: Path) -> None:
        if self.world.size == 1:  # from where they lie; DCP would copy them all first
            save_tensors(tensors, folder / "model.safetensors")
            return
        storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=storage, process_group=self._beside.group)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, dcp.CheckpointException) as error:
            found = (
                [why for why, _ in error.failures.values()] if isinstance(error, dcp.CheckpointException) else [error]
            )
            reason = "; ".join(map(str, found))
            way_out = "make room there" if any(map(lacks_room, found)) else "mend that"
            raise CheckpointError(
                f"checkpoint {name} cannot be written to {self.folder}: {reason}. Earlier ones are as they were: {way_out}, "
                "and go on from the latest with --resume"
            ) from error

    def _link(self, link: str, target: str) -> None:
        temporary = self.folder / f".{link}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, self.folder / link)

    def _delete_old(self) -> None:
        linked = {(self.folder / link).resolve().name for link in ("latest", "best")}
        old = sorted(self.folder.glob("step-*"))[: -self.config.keep]
        unlinked = [folder for folder in old if folder.name not in linked]
        self._discards.discard(*unlinked, *self.folder.glob(f"{_UNFINISHED}*"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except CheckpointError as error:
            if error_type is None:
                raise
            print(error, file=sys.stderr)  # beside what ends the run


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
    try:
        step = None if folder is None else json.loads((folder / _STATE).read_text())["step"]
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

    def load(
        self,
        policy: PolicyModel,
        optimizer: torch.optim.Optimizer,
        reference: ReferenceModel,
        replay: ReplayBuffer,
        supply: Supply,
    ) -> None:
        """Takes all that was saved from it, whatever number of processes wrote it."""
        replay.restore(self.folder / _REPLAY)
        supply.restore(self.folder / _TRAINER)
        reference.version = self.state.reference_version
        # One that was never reset is the model as it was first loaded, which it holds by now.
        if (self.folder / _REFERENCE).exists() and policy.adapters is None:
            reference.load(self.folder / _REFERENCE)
        read_weights(policy.saved_weights(), self.folder / ADAPTERS if policy.adapters else self.folder)
        if not (self.folder / _OPTIMIZER).exists():  # no step was ever taken
            return
        stored = stored_tensors(self.folder / _OPTIMIZER)
        for name, parameter in policy.trained_weights().items():
            if f"{name}/step" not in stored:  # it never had a gradient
                continue
            moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        read_weights(_optimizer_tensors(policy, optimizer), self.folder / _OPTIMIZER)


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
    values = json.loads((folder / _STATE).read_text())
    found = values.pop("format")
    if found != FORMAT:
        raise ValueError(f"state.json: format {found!r}, this version reads {FORMAT}")
    return values, json.loads((folder / _MANIFEST).read_text())


def _good_one_before(folder: Path, world: World) -> Path | None:
    earlier = sorted(other for other in folder.parent.glob("step-*") if other.name < folder.name)
    for other in reversed(world.gather(earlier)[0]):  # all processes look at the same ones
        try:
            _checked_state(other, world)
        except _WRONG:
            continue
        return other
    return None


def _optimizer_tensors(policy: PolicyModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Views of the optimiser's state; safetensors reads no slice of a tensor without dimensions, so AdamW's `step` gets one."""
    return {
        f"{name}/{key}": value[None] if value.dim() == 0 else value
        for name, parameter in policy.trained_weights().items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(folder: Path, name: str, wanted: str) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    return None if _hash(path) == wanted else f"{name} is damaged: its hash is not that of {_MANIFEST}"
