"""Names of files that come out of a file: they must not lead out of the folder that they stand for."""

from __future__ import annotations


def plain_name(name: object) -> str:
    """`name`, if it is that of a file in a folder, and no path. Raises ValueError."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{name!r} is no plain name of a file")
    return name


def path_within(name: object) -> str:
    """`name`, if it is a path of plain names with slashes between them. Raises ValueError."""
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is no name of a file")
    return "/".join(map(plain_name, name.split("/")))
