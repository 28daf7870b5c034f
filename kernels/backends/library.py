"""What the libraries of the CPU kernels are called. setup.py runs this file too, where tbrm_kernels cannot be imported."""

from __future__ import annotations

import re

NOTE = "_cpu_not_built.txt"
"""Beside the libraries, where there are none: why."""


def library_name(capability: str, torch_version: str) -> str:
    """Of the kernels for an instruction set and a torch. All patches of a minor version share a C++ interface; a build that is
    no release has its own."""
    release = re.match(r"(\d+)\.(\d+)\.\d+(\+|$)", torch_version)
    label = f"{release[1]}_{release[2]}" if release else re.sub(r"\W", "_", torch_version)
    return f"_cpu_{capability.lower()}_torch{label}"
