"""The part of the format verifier that runs in a process of its own (`tbrm.tasks.workers`)."""

from __future__ import annotations

import re


def matches(pattern: str, response: str) -> bool:
    return re.fullmatch(pattern, response, re.DOTALL) is not None
