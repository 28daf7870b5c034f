"""The replay buffer: trajectories need no importance ratio in TBRM, so old ones may be used again.

The unit is a group, all responses to one problem: objectives that compare them find them together, and packing computes
their prompt once. The oldest groups leave first.

Trajectories lie in files of the run's folder, a file for each step that brought something new, and are memory-mapped: what of
them is in memory is the operating system's affair. A file is never changed. So a checkpoint holds links to the files, and
writes the index alone; when the reference has moved on and a group was scored anew, the group is written again to the
file of that step. The buffer is the main process's, and the others are told what it drew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from safetensors import SafetensorError

from tbrm.config.rollout import ReplayConfig
from tbrm.parallel import ALONE, World
from tbrm.reporting.metrics import Phases
from tbrm.rollout.interface import derive_seed
from tbrm.storage.files import Discards, lacks_room
from tbrm.storage.kept import Kept
from tbrm.storage.names import plain_name
from tbrm.trajectories.stored import load_trajectories, save_trajectories
from tbrm.trajectories.trajectory import Trajectory

_INDEX = "index.json"


@dataclass
class _Group:
    """One group, and where it lies: rows [start, stop) of a file."""

    group: int
    file: str
    start: int
    stop: int
    tokens: int
    weight_version: int | None
    reference_version: int | None
    """The version of the reference scores in the file."""
    residual: float | None = None
    """Mean |residual| of its trajectories when they were last trained on; None if they never were."""


class ReplayBuffer(Kept):
    """Draws groups uniformly or in proportion to |residual|, without replacement: the same ones for the same seed."""

    def __init__(self, config: ReplayConfig, folder: Path, seed: int, world: World = ALONE) -> None:
        self.config = config
        self.folder = folder
        self.seed = seed
        self.expired = 0
        """Trajectories that were dropped for their age since `metrics` was last asked."""
        self._world = world
        self._kept: dict[int, _Group] = {}  # by group, the oldest first
        self._hashes: dict[str, str] = {}  # of every file
        self._discards = Discards(folder)
        if world.is_main:
            self.close()  # of what a killed run left; checkpoints have links of their own

    def sample(self, step: int, phases: Phases) -> list[Trajectory]:
        """At least `replay.samples_per_step` trajectories for update `step`, as whole groups, or all there are."""
        if not self.config.samples_per_step:
            return []
        with phases("replay"):
            return self._world.on_main(lambda: self._sample(step))

    def _sample(self, step: int) -> list[Trajectory]:
        self._drop_expired(step)
        rows: dict[str, list[int]] = {}
        for kept in self._draw(derive_seed("replay", self.seed, step)):
            rows.setdefault(kept.file, []).extend(range(kept.start, kept.stop))
        try:
            return [t for file in sorted(rows) for t in load_trajectories(self.folder / file, sorted(rows[file]))]
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the replay buffer cannot read its files in {self.folder}: {error}. Go on from the last checkpoint, which has "
                "its own, with --resume"
            ) from error

    def _draw(self, seed: int) -> list[_Group]:
        groups = list(self._kept.values())
        # The largest keys log w + Gumbel noise are a draw without replacement in proportion to the weights w.
        with np.errstate(divide="ignore"):
            log_weights = np.log(self._weights(groups))
        keys = log_weights + np.random.default_rng(seed).gumbel(size=len(groups))
        drawn, count = [], 0
        for index in np.argsort(-keys, kind="stable"):
            if count >= self.config.samples_per_step:
                break
            drawn.append(groups[index])
            count += groups[index].stop - groups[index].start
        return drawn

    def _weights(self, groups: Sequence[_Group]) -> np.ndarray:
        if self.config.sampling == "uniform":
            return np.ones(len(groups))
        largest = max((group.residual for group in groups if group.residual is not None), default=1.0)
        return np.array([largest if group.residual is None else group.residual for group in groups], dtype=np.float64)

    def update(self, step: int, trajectories: Sequence[Trajectory], residuals: Sequence[float]) -> None:
        """Takes in what update `step` was made of: groups that it does not have yet, and of those that it has, their new
        residuals and reference scores. Residuals that are not finite count as 0: such a group is drawn last."""
        self._world.on_main(lambda: self._update(step, trajectories, residuals))

    def _update(self, step: int, trajectories: Sequence[Trajectory], residuals: Sequence[float]) -> None:
        members: dict[int, list[int]] = {}
        for i, trajectory in enumerate(trajectories):
            members.setdefault(trajectory.group, []).append(i)

        def is_written(group: int) -> bool:
            score, kept = trajectories[members[group][0]].reference, self._kept.get(group)
            return kept is not None and score is not None and kept.reference_version == score.version

        self._write(
            f"step-{step:06d}.safetensors",
            [[trajectories[i] for i in indices] for group, indices in members.items() if not is_written(group)],
        )
        for group, indices in members.items():
            residual = fmean(abs(residuals[i]) for i in indices)
            self._kept[group].residual = residual if math.isfinite(residual) else 0.0
        self._drop_oldest()

    def add(self, name: str, groups: Iterable[Sequence[Trajectory]]) -> None:
        """Takes in groups that were not trained on yet, in a file called `name`."""
        self._write(f"{name}.safetensors", list(groups))
        self._drop_oldest()

    def _write(self, file: str, groups: Sequence[Sequence[Trajectory]]) -> None:
        if not groups:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / file).unlink(missing_ok=True)  # what a link leads to is never written to
            save_trajectories(self.folder / file, [t for members in groups for t in members])
            with (self.folder / file).open("rb") as written:
                self._hashes[file] = hashlib.file_digest(written, "sha256").hexdigest()
        except (OSError, SafetensorError) as error:
            way_out = "Make room there" if lacks_room(error) else "Mend that"
            raise OSError(
                f"the replay buffer cannot write {self.folder / file}: {error}. {way_out}, and go on with --resume"
            ) from error
        start = 0
        for members in groups:
            first, stop = members[0], start + len(members)
            tokens = sum(len(t.prompt_ids) + len(t.response_ids) for t in members)
            versions = [t.weight_version for t in members if t.weight_version is not None]
            reference_version = first.reference.version if first.reference else None
            self._kept[first.group] = _Group(
                first.group, file, start, stop, tokens, min(versions, default=None), reference_version
            )
            start = stop

    def _drop_oldest(self) -> None:
        size, tokens = self._size(), sum(k.tokens for k in self._kept.values())
        limit, token_limit = self.config.capacity or math.inf, self.config.capacity_tokens or math.inf
        for group in list(self._kept):
            if size <= limit and tokens <= token_limit:
                break
            dropped = self._kept.pop(group)
            size -= dropped.stop - dropped.start
            tokens -= dropped.tokens
        self._delete_files()

    def _drop_expired(self, step: int) -> None:
        if not self.config.max_staleness:
            return
        oldest = step - 1 - self.config.max_staleness
        for kept in list(self._kept.values()):
            if kept.weight_version is not None and kept.weight_version < oldest:
                del self._kept[kept.group]
                self.expired += kept.stop - kept.start
        self._delete_files()

    def _delete_files(self) -> None:
        for file in self._hashes.keys() - {kept.file for kept in self._kept.values()}:
            del self._hashes[file]
            self._discards.discard(self.folder / file)

    def _size(self) -> int:
        return sum(kept.stop - kept.start for kept in self._kept.values())

    def metrics(self) -> dict[str, float]:
        """What is kept, and how many trajectories were dropped for their age since the last call."""
        if not self.config.enabled:
            return {}
        expired, self.expired = self.expired, 0
        return {"replay_size": self._size(), "replay_expired": expired}

    def save(self, folder: Path) -> dict[str, str]:
        folder.mkdir()
        for file in self._hashes:
            _link(self.folder / file, folder / file)
        index = {"files": self._hashes, "kept": [vars(kept) for kept in self._kept.values()]}
        (folder / _INDEX).write_text(json.dumps(index))
        return dict(self._hashes)

    def restore(self, folder: Path) -> None:
        if self.config.enabled:
            self._world.on_main(lambda: self._restore(folder))

    def _restore(self, folder: Path) -> None:
        if not folder.exists():
            return
        index = json.loads((folder / _INDEX).read_text())
        try:
            self._hashes = {plain_name(file): sha256 for file, sha256 in index["files"].items()}
            self._kept = {kept["group"]: _Group(**kept) for kept in index["kept"]}
            if lost := {kept.file for kept in self._kept.values()} - self._hashes.keys():
                raise ValueError(f"{sorted(lost)} are kept, and not among its files")
        except ValueError as error:
            raise ValueError(
                f"{folder / _INDEX}: {error}: not what tbrm wrote; go on from another checkpoint"
            ) from error
        self.folder.mkdir(parents=True)
        for file in self._hashes:
            _link(folder / file, self.folder / file)

    def close(self) -> None:
        """Deletes the buffer's files; checkpoints have theirs."""
        if self._world.is_main:
            Discards(self.folder.parent).discard(self.folder)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
