"""Trajectories of others for the replay buffer: files of JSON lines, in the form of offline.py, that may grow while training
goes on: `tbrm rollout` with another model, people, another run."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tbrm.config.foreseen import require_recorded
from tbrm.experience.offline import RowReader
from tbrm.experience.replay import ReplayBuffer
from tbrm.reporting.metrics import Phases
from tbrm.trajectories.trajectory import Trajectory


class RecordedFiles:
    """Reads what is new in the files that `patterns` match: whole lines alone, each of them once. `position` is all of its
    state: how many bytes and lines of each file are read, and how many groups were made of them."""

    def __init__(self, patterns: Sequence[str], rows: RowReader) -> None:
        require_recorded(patterns)
        self.patterns = patterns
        self.rows = rows
        self.position: dict[str, list[int]] = {}

    def feed(self, replay: ReplayBuffer, step: int, phases: Phases) -> dict[str, float]:
        """Puts the new ones into the buffer, before update `step`. Raises ValueError naming a line that cannot be used."""
        if not self.patterns:
            return {}
        with phases("replay"):
            return {"recorded": self._feed(replay, step)}

    def _feed(self, replay: ReplayBuffer, step: int) -> int:
        self.rows.seen = self.rows.left_out = self.rows.ungraded = 0
        usable = [t for path in self._paths() for t in self._read(path)]
        for count in self.rows.counts():
            print(f"replay.files: {count}", file=sys.stderr)
        groups: dict[tuple[int, ...], list[Trajectory]] = {}
        for trajectory in usable:
            groups.setdefault(tuple(trajectory.prompt_ids), []).append(trajectory)
        made = self.position.setdefault("groups", [0])
        for members in groups.values():
            made[0] += 1
            for trajectory in members:
                trajectory.group = -made[0]  # those of rollouts count from 0 up
        replay.add(f"recorded-{step:06d}", list(groups.values()))
        return len(usable)

    def _paths(self) -> list[str]:
        return sorted({path for pattern in self.patterns for path in glob.glob(pattern)})

    def _read(self, path: str) -> Iterator[Trajectory]:
        place = self.position.setdefault(f"file {path}", [0, 0])
        size = Path(path).stat().st_size
        if size < place[0]:
            raise ValueError(
                f"replay.files: {path} is shorter than it was ({size} bytes, {place[0]} were read): only append"
            )
        with open(path, "rb") as file:
            file.seek(place[0])
            lines = file.read(size - place[0]).split(b"\n")[:-1]  # what follows the last newline is still being written
        for line in lines:
            place[0] += len(line) + 1
            place[1] += 1
            if (trajectory := self.rows.read(line, f"{path}:{place[1]}")) is not None:
                yield trajectory
