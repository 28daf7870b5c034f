"""How the answer is taken out of a response. All of it is linear in the length of the text: responses are untrusted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

Extractor = Literal["last_number", "answer_tag", "boxed", "whole"]
Convention = Literal["last_boxed", "boxed_or_last", "anywhere"]
Thinking = Literal["required_closed", "ignored"]

_LONGEST_LINE = 2000
"""Characters at the end of a line in which its answer is looked for."""

_NUMBER = re.compile(
    r"""
    (?: (?<![0-9A-Za-z_)\]}]) (?P<sign>[-+\u2212]) )?   # "5-3" and "(x)-3" end in 3, "= -3" in -3
    [$€£¥]?
    (?<![0-9A-Za-z_^])                                  # "cm2" and "m^2" are no numbers
    (?P<integer> [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ | (?<!\.)(?=\.[0-9]) )
    (?P<decimals> \.[0-9]+ )?
    (?P<exponent> [eE][-+]?[0-9]{1,3}(?![0-9A-Za-z_]) )?
    """,
    re.VERBOSE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace does not count


def last_number(text: str) -> str | None:
    r"""The last number of `text` in plain notation, or None: ``"so it costs -$01,234.50."`` gives ``"-1234.50"``.

    Commas between thousands, a leading "+", leading zeros and currency signs are dropped, decimals and exponents kept.
    A percent sign is not part of the number. A minus after a letter, a digit or a closing bracket is no sign.
    """
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007  (the last one is wanted, and holding all of them is not)
        pass
    if match is None:
        return None
    sign = "-" if match["sign"] in ("-", "\u2212") else ""
    integer = match["integer"].replace(",", "").lstrip("0") or "0"
    return f"{sign}{integer}{match['decimals'] or ''}{match['exponent'] or ''}"


def answer_tag(text: str) -> str | None:
    """What the last ``<answer>...</answer>`` holds, stripped; None if there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` or ``\fbox{...}`` holds, stripped, braces balanced, or what follows it without any; None
    if there is none or it is cut off."""
    last = None
    for last in _BOX.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    start = last.end()
    if text[start : start + 1] != "{":
        return re.split(r"[\s$]", text[start:], maxsplit=1)[0] or None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return None


def whole(text: str) -> str | None:
    """All of the response, stripped."""
    return text.strip()


def after_thinking(text: str, thinking: Thinking) -> str:
    """What follows reasoning between ``<think>`` and ``</think>``; nothing if the last one is never closed. With "ignored" the
    tags are text like any other."""
    if thinking == "ignored":
        return text
    begun, closed = text.rfind("<think>"), text.rfind("</think>")
    if begun > closed:
        return ""
    return text if closed < 0 else text[closed + len("</think>") :]


def final_answer(text: str, convention: Convention) -> str | None:
    """Where the answer stands: in the last box, which is none if it is unfinished; without any box in the last line that is not
    empty, or with "last_boxed" nowhere. "anywhere" is all of the text."""
    if convention == "anywhere":
        return text
    if convention == "last_boxed" or _BOX.search(text):
        return boxed(text)
    return last_line(text)


def last_line(text: str) -> str | None:
    """The end of the last line that is not empty."""
    return text.rstrip().rpartition("\n")[2][-_LONGEST_LINE:].strip() or None


EXTRACTORS: dict[Extractor, Callable[[str], str | None]] = {
    "last_number": last_number,
    "answer_tag": answer_tag,
    "boxed": boxed,
    "whole": whole,
}
