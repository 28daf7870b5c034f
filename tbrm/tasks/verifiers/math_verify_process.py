"""The part of the math_verify verifier that runs in processes of its own (`tbrm.tasks.workers`).

What the answer is, and which notation it has, is ours to say (`tbrm.tasks.answers`, `tbrm.tasks.notation`); whether two answers
are mathematically equal, math-verify's.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from math_verify import parse, verify

from tbrm.tasks.answers import Convention, Thinking, after_thinking, boxed, final_answer
from tbrm.tasks.choices import chosen_letter
from tbrm.tasks.notation import plain_characters, plain_latex, word

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its time limits are off: ours are on

_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
_CUE = re.compile(r"(?i:\b(?:answers?|results?|solutions?|value|total)\s*(?:is|are|:|=|equals)[\s:]*)")
_EQUALS = re.compile(r"(?<![<>!=])=+")
_SEVERAL = re.compile(r",|;|\bor\b|\band\b")
_UNITS = re.compile(r"(?<=[0-9}\s])\s*[A-Za-z]{2,}\.?(?:\s*\^\{?[0-9]\}?)?(?:[\s/][A-Za-z]+\.?(?:\s*\^\{?[0-9]\}?)?)*$")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z]+\*?\}|\\[A-Za-z]+|\b(?:sin|cos|tan|cot|sec|csc|ln|log|exp|pi|sqrt)\b")
_WORDS = re.compile(r"[A-Za-z]{2,}")


def equal(answers: list[str], response: str, convention: Convention, thinking: Thinking) -> bool:
    """Whether what `response` comes to is equal to one of `answers`, which are LaTeX or plain, with or without delimiters."""
    found = final_answer(after_thinking(plain_characters(response), thinking), convention)
    # All of them, so that one that cannot be read is not hidden by one that fits.
    return any([_same(answer, found or "", anywhere=convention == "anywhere") for answer in answers])


def _same(answer: str, found: str, *, anywhere: bool) -> bool:
    gold = plain_characters(answer)
    wanted = plain_latex(boxed(gold) or gold)
    parsed = parse(gold if _DELIMITER.search(gold) else f"${wanted}$", parsing_timeout=None)
    if not parsed:
        raise ValueError(f"the reference answer {answer!r} cannot be parsed")
    if not found:
        return False
    if anywhere:
        return _is(parsed, parse(found, parsing_timeout=None))
    given = plain_latex(_after_cue(found))
    if word(wanted) in (word(given), word(found)):
        return True
    if re.fullmatch(r"\(?[A-J]\)?", wanted):
        return chosen_letter(found) == wanted.strip("()")
    if re.fullmatch(
        r"[A-Za-z]{3,}(?: [A-Za-z]+)*", wanted
    ):  # a word: as a product of its letters "east" would be "seat"
        return False
    return _is(parsed, _parsed(_right_side(given, wanted), found))


def _after_cue(text: str) -> str:
    """What follows the last "the answer is"."""
    last = None
    for last in _CUE.finditer(text):  # noqa: B007
        pass
    return text if last is None else text[last.end() :]


def _right_side(given: str, wanted: str) -> str:
    """Of the last equation, where no equation is asked for and one number."""
    if _EQUALS.search(wanted) or _SEVERAL.search(given):
        return given
    return _EQUALS.split(given)[-1].strip()


def _parsed(given: str, found: str) -> list[Any]:
    """As mathematics if it is nothing else, but for a unit; or whatever math-verify finds in it."""
    bare = re.sub(r"\s+(?:and|or)\s+", ", ", _UNITS.sub("", given).strip())
    if bare and not _WORDS.search(_COMMAND.sub(" ", bare)):
        return parse(f"${bare}$", parsing_timeout=None)
    return parse(found, parsing_timeout=None)


def _is(wanted: list[Any], given: list[Any]) -> bool:
    return bool(verify(wanted, given, timeout_seconds=None))
