"""Files as a run must write and delete them: with the modes that the umask says, and in spite of people who read them."""

from __future__ import annotations

import errno
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

_DISCARDED = ".deleted-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file."""
    save_file(dict(tensors), path, {"format": "pt", **(metadata or {})})
    open_to_umask(path)


def open_to_umask(path: Path) -> None:
    """Gives a file the mode of any new one beside it: safetensors makes its own readable to the owner alone."""
    probe = path.with_name(f".{path.name}.mode")  # to ask for the umask is to set it, for all threads
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    if path.stat().st_mode != mode:
        path.chmod(mode)


def lacks_room(error: BaseException) -> bool:
    """Whether a disk or a quota is full. safetensors keeps the system's number in its text alone."""
    return getattr(error, "errno", None) in _NO_ROOM or any(f"(os error {number})" in str(error) for number in _NO_ROOM)


class Discards:
    """What is deleted of a folder, or will be: a file that somebody reads on NFS may not go yet, and one day it does.

    It goes from under its name first, so that no half of it is ever taken for the whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told: set[str] = set()

    def discard(self, *paths: Path) -> None:
        """Deletes what it can of those of `paths` that are there, and of what was left before, and tells of the rest once."""
        for path in filter(Path.exists, paths):
            try:
                path.rename(self.folder / f"{_DISCARDED}{path.name}-{secrets.token_hex(4)}")
            except OSError as error:
                self._tell(path.name, error)
        for path in self.folder.glob(f"{_DISCARDED}*"):
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            except OSError as error:
                self._tell(path.name.removeprefix(_DISCARDED).rpartition("-")[0], error)

    def _tell(self, name: str, error: OSError) -> None:
        if name not in self._told:
            self._told.add(name)
            print(f"{self.folder / name} cannot be deleted yet, which will be tried again: {error}", file=sys.stderr)
