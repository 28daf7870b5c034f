"""The checkpoints of a run as they are written; checkpoint.py says what is in one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from tbrm.config.training import CheckpointConfig
from tbrm.parallel import World
from tbrm.storage.files import Discards, lacks_room, save_tensors
from tbrm.storage.kept import Kept
from tbrm.training.checkpoint import (
    FORMAT,
    MANIFEST,
    STATE,
    TRAINER,
    Checkpoint,
    CheckpointError,
    TrainerState,
    hash_of,
    latest_folder,
)

_UNFINISHED = ".writing-"


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

    def save(self, state: TrainerState, kept: Mapping[str, Kept], *, best: bool) -> None:
        """`kept`: the parts of the run, by the folder that each has in a checkpoint. Raises CheckpointError if this one, or the
        one before, could not be written."""
        self.wait()
        name = f"step-{state.step:06d}"
        writing = self.folder / f"{_UNFINISHED}{name}"
        tensors = {folder: dict(part.tensors()) for folder, part in kept.items()}

        def begin() -> dict[str, str]:
            """Of what the main process writes; returns the hashes of files that need not be read for it."""
            with self._explained(name):
                self._discards.discard(writing)
                (writing / TRAINER).mkdir(parents=True)
                values = {"format": FORMAT, **asdict(state)}
                (writing / STATE).write_text(json.dumps(values, indent=2) + "\n")
                return {
                    str(Path(folder) / file): digest
                    for folder, part in kept.items()
                    for file, digest in part.save(writing / folder).items()
                }

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
            manifest = {name: hashes.get(name) or hash_of(writing / name) for name in names}
            (writing / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
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


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
