"""Which of several options a response chooses: exams print and models write it in many ways."""

from __future__ import annotations

import re

from tbrm.tasks.notation import plain_characters, plain_latex

LETTERS = "ABCDEFGHIJ"

_ALONE = re.compile(r"[(\[]?([A-J])[)\]]?[.):]?|[(\[]([a-j])[)\]]|([a-j])[.)]?")
_BEFORE_ITS_TEXT = re.compile(r"[(\[]?([A-J])[)\]]?[.):](?=\s)|[(\[]([A-J])[)\]](?=\s)")
# "A" and "I" are words, too: as an answer they are followed by nothing, or by what cannot follow the word.
_AFTER_CUE = re.compile(
    r"""(?i:answer|option|choice)s?(?:\s+(?i:is|are|would\s+be|must\s+be|should\s+be))?\s*[:=-]?\s*(?i:option|choice)?
    \s*[*(\[$"']*(?:([B-HJ])(?![A-Za-z0-9'])|([AI])(?=[*)\]$"']*\s*(?:$|[.,;:)\n]|(?:because|since|as|which)\b)))""",
    re.VERBOSE,
)
_IN_BRACKETS = re.compile(r"\(([A-J])\)")


def chosen_letter(answer: str) -> str | None:
    """The letter, A to J, that an answer comes to; None if it comes to none."""
    text = plain_latex(plain_characters(answer))
    found = _ALONE.fullmatch(text) or _BEFORE_ITS_TEXT.match(text)
    for pattern in (_AFTER_CUE, _IN_BRACKETS):
        if found is None:
            for found in pattern.finditer(text):  # noqa: B007  (the last one)
                pass
    return None if found is None else next(letter for letter in found.groups() if letter).upper()
