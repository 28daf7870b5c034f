"""What a checkpoint keeps: the parts of a run's state, each of which writes and reads files of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Kept(Protocol):
    """One part, in its folder of a checkpoint, which it makes where it has something to write."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What all processes write together, each its slices. Asked of all of them, and before `save`."""
        return {}

    def save(self, folder: Path) -> Mapping[str, str]:
        """Writes the rest, on the main process alone; returns the hashes of files that need not be read for it."""
        return {}

    def restore(self, folder: Path) -> None:
        """Takes over what was written, whatever number of processes did it. All of them call it."""
        ...
