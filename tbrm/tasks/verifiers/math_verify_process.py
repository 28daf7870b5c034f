"""The part of the math_verify verifier that runs in processes of its own (`tbrm.tasks.workers`)."""

from __future__ import annotations

import logging
import re

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its time limits are off: ours are on

_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")


def equal(answer: str, response: str) -> bool:
    """Whether `response` ends in something equal to `answer`, which is LaTeX or plain, with or without delimiters."""
    wanted = parse(answer if _DELIMITER.search(answer) else f"${answer}$", parsing_timeout=None)
    if not wanted:
        raise ValueError(f"the reference answer {answer!r} cannot be parsed")
    return bool(verify(wanted, parse(response, parsing_timeout=None), timeout_seconds=None))
