"""Names of files that come out of a file: they must not lead out of the folder that they stand for."""

from __future__ import annotations


def is_plain_name(name: object) -> bool:
    """Whether it is that of a file in a folder, and no path."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def plain_name(name: object) -> str:
    """`name`, if it is plain. Raises ValueError."""
    if not isinstance(name, str) or not is_plain_name(name):
        raise ValueError(f"{name!r} is no plain name of a file")
    return name


def path_within(name: object) -> str:
    """`name`, if it is a path of plain names with slashes between them. Raises ValueError."""
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is no name of a file")
    return "/".join(map(plain_name, name.split("/")))
