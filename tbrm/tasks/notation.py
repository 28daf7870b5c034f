"""Answers in one notation: what people and models write in many ways is brought together before it is compared."""

from __future__ import annotations

import re
import unicodedata

_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_NOTHING = "\u200b\u200c\u200d\u2060\ufeff"
_AS_LATEX = {
    "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "°": r"^\circ ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ",
    "٫": ".", "٬": ",",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ",
}  # fmt: skip
_SIGNS = {
    "−": "-",
    "﹣": "-",
    "－": "-",
    "⁄": "/",
    "∕": "/",
    "＋": "+",
    "＝": "=",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_SCRIPT = dict(zip(_SUPERSCRIPTS, "0123456789+-n", strict=True))
_CHARACTERS = str.maketrans(
    {**dict.fromkeys(_SPACES, " "), **dict.fromkeys(_NOTHING, ""), **_AS_LATEX, **_SIGNS}
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF08, 0xFF5E)}  # full width
)
_ROOT = re.compile(r"√\s*(?:\(([^()\n]{1,100})\)|([0-9A-Za-z.]{1,100}))")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(
    r"(?<!\\)\\(?:[,;:! ]|quad(?![a-z])|qquad(?![a-z])|left(?![a-z])|right(?![a-z])|displaystyle(?![a-z]))"
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!)(?=[0-9]{3})")
_SPACED = re.compile(r"[0-9]{1,3}(?: [0-9]{3})+")
_EXPONENT = re.compile(r"(?<![0-9A-Za-z_.])([0-9]+(?:\.[0-9]*)?)[eE]([-+]?[0-9]{1,3})(?![0-9A-Za-z_])")


def plain_characters(text: str) -> str:
    """The same with ASCII for other alphabets' digits, minus signs, spaces and widths, and LaTeX for fractions such as ½ and
    for symbols: ``"−３½"`` becomes ``"-3\\frac{1}{2}"``."""
    if text.isascii():
        return text
    text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda found: "^{" + "".join(_SCRIPT[c] for c in found[0]) + "}", text)
    text = "".join(_one(character) for character in text.translate(_CHARACTERS))
    text = re.sub(r"(?<![0-9A-Za-z])[–—](?=[0-9.])", "-", text)  # a dash that can be no range
    return _ROOT.sub(lambda found: f"\\sqrt{{{found[1] or found[2]}}}", text)


def _one(character: str) -> str:
    if character.isascii():
        return character
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    decomposed = unicodedata.normalize("NFKC", character)
    if unicodedata.category(character) == "No" and "\u2044" in decomposed:
        return "\\frac{{{}}}{{{}}}".format(*decomposed.split("\u2044"))
    return character


def plain_latex(text: str) -> str:
    """A short text without what LaTeX and Markdown add for the eye: fonts, spacing, dollar signs, a full stop at its end."""
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\$", "").replace("\\%", "%")
    text = _SPACING.sub(
        lambda found: "" if found[0] in ("\\left", "\\right", "\\!") else " ", _THOUSANDS.sub(",", text)
    )
    for _ in range(3):  # \textbf{\text{B}}
        text = _WRAPPED.sub(r"\1", text)
    text = re.sub(r"^[\s$*_`#:]+|[\s$*_`]+$", "", text)
    text = re.sub(r"(?<!\.)\.$", "", text.removesuffix("\\\\")).strip()
    text = re.sub(r"^[\s$*_`]+|[\s$*_`]+$", "", text)
    text = text.replace(" ", "") if _SPACED.fullmatch(text) else text
    return _EXPONENT.sub(r"\1\\cdot 10^{\2}", text)


def word(text: str) -> str:
    """For comparing texts letter by letter: without differences of case and white space."""
    return " ".join(plain_latex(plain_characters(text)).casefold().split())
