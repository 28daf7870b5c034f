"""Layouts: how trajectories stand beside each other where the backbone reads them. After its hidden states all is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tbrm.trajectories.batch import TrajectoryBatch
from tbrm.trajectories.deal import deal
from tbrm.trajectories.packing import pack
from tbrm.trajectories.rows import LengthClass, deal_rows, pack_rows
from tbrm.trajectories.trajectory import Trajectory


class Layout(Protocol):
    def split(self, trajectories: Sequence[Trajectory], max_tokens: int, processes: int = 1) -> list[list[list[int]]]:
        """Indices of the trajectories of each micro-batch, of at most `max_tokens` as they are laid out, of each process. All
        get equally many; the last ones may be empty."""
        ...

    def pack(self, trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
        """A micro-batch of them, in the order given; of none, or none that acts, one that the model can run all the same."""
        ...


class Packing(Layout):
    """One row without padding; see packing.py."""

    def split(self, trajectories: Sequence[Trajectory], max_tokens: int, processes: int = 1) -> list[list[list[int]]]:
        return deal(trajectories, max_tokens, processes)

    def pack(self, trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
        return pack(trajectories)


class Rows(Layout):
    """A row for each, padded at its end; see rows.py."""

    def __init__(self, class_of: LengthClass) -> None:
        self.class_of = class_of

    def split(self, trajectories: Sequence[Trajectory], max_tokens: int, processes: int = 1) -> list[list[list[int]]]:
        return deal_rows(trajectories, max_tokens, processes, self.class_of)

    def pack(self, trajectories: Sequence[Trajectory]) -> TrajectoryBatch:
        return pack_rows(trajectories)
