"""The part of the reasoning-gym task that touches reasoning-gym. It runs in a process of its own (`tbrm.tasks.workers`)
because that library is not safe beside a trainer: some scorers pass the answer to Python's ``eval`` or to sympy, some
answers make a scorer run for ever, and some families print, reseed numpy, or draw from sets, whose order changes with
the interpreter's hash seed.

An item is known by its position on one line of 2^32. reasoning-gym seeds item `index` of a data set with the data set's
seed plus `index`; here each block of the line is a data set whose seed is where the block starts, so an item's seed is
its position. What some families prepare for a whole data set, they prepare once a block.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import string
from fractions import Fraction
from functools import lru_cache
from typing import Any

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS, create_dataset

from tbrm.spelling import hint
from tbrm.tasks.answers import EXTRACTORS, Extractor

_BLOCK = 1024

# Families whose scorer gives the answer to float() or complex(), which read "nan", and min(1.0, nan) is 1.
_FLOAT = {"advanced_geometry", "complex_arithmetic", "number_format", "polynomial_equations"}
# Families whose scorer gives the answer to eval(). It wants a list: nothing else is let through.
_EVAL = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
_LITERAL = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.UnaryOp, ast.UAdd, ast.USub, ast.Load)
# Families whose scorer gives the answer to sympy.parse_expr, which uses eval(): arithmetic with one-letter variables and
# calls of these functions is let through.
_PARSE_EXPR = {"countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration"}
_ARITHMETIC = (ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.BitXor)
_FORMULA = (*_ARITHMETIC, ast.UnaryOp, ast.UAdd, ast.USub, ast.Expression, ast.Constant, ast.Tuple, ast.Load)
_FUNCTIONS = {"sin", "cos", "tan", "asin", "acos", "atan", "exp", "log", "ln", "sqrt", "Integral"}


def check(family: str, params: str, prompt: str, answer: Extractor) -> str | None:
    """What is wrong with these fields of the task, or None. `params` is a JSON object, as everywhere below."""
    if family not in DATASETS:
        return f"family: reasoning-gym has no {family!r}: {hint(family, DATASETS)}"
    known = {field.name for field in dataclasses.fields(DATASETS[family][1])} - {"seed", "size"}
    for name in json.loads(params):
        if name in ("seed", "size"):
            return f"params.{name}: tbrm sets it; for other held-out problems change heldout_seed"
        if name not in known:
            return f"params.{name}: {family} has no such parameter: {hint(name, known)}"
    try:
        item = _item(family, params, 0)
    except Exception as error:  # validate() uses assertions; wrong types surface as anything
        return f"params: {family} does not accept {params}: {error or type(error).__name__}"
    try:
        _render(prompt, item)
    except ValueError as error:
        return str(error)
    if answer == "last_number":
        return _check_last_number(family, params)
    return None


def _check_last_number(family: str, params: str) -> str | None:
    for position in range(8):  # several: some families mix kinds of answers
        wanted = _item(family, params, position)["answer"]
        if wanted is None or score(family, params, position, "last_number", wanted) < 1:
            return (
                f"answer: last_number cannot give what {family} wants, such as {wanted!r}; "
                "use answer_tag, boxed or whole, and ask for that form in the prompt"
            )
    return None


def make(family: str, params: str, prompt: str, position: int) -> tuple[str, str]:
    """The prompt and the reference answer of the item at `position`; "" where a family has no single answer."""
    item = _item(family, params, position)
    return _render(prompt, item), item["answer"] or ""


def score(family: str, params: str, position: int, answer: Extractor, response: str) -> float:
    """What reasoning-gym's scorer gives the answer that `response` holds; 0 if it holds none."""
    text = EXTRACTORS[answer](response)
    item = _item(family, params, position)
    # All scorers compare with the reference answer before they evaluate anything, or may evaluate it.
    if text is None:
        return 0.0
    if text != item["answer"] and not (_harmless(family, text) and _may_be_right(family, text, item["answer"])):
        return 0.0
    return float(_dataset(family, params, position - position % _BLOCK).score_answer(text, item))


@lru_cache(maxsize=4)
def _dataset(family: str, params: str, start: int) -> ProceduralDataset:
    return create_dataset(family, **json.loads(params), seed=start, size=_BLOCK)


@lru_cache(maxsize=4096)  # scoring comes soon after making, and some items take seconds to make
def _item(family: str, params: str, position: int) -> dict[str, Any]:
    item: dict[str, Any] = _dataset(family, params, position - position % _BLOCK)[position % _BLOCK]
    return item


def _render(prompt: str, item: dict[str, Any]) -> str:
    values = {**item["metadata"], "question": item["question"]}
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    except ValueError as error:
        raise ValueError(f"prompt: {prompt!r}: {error}; write {{{{ and }}}} for braces") from error
    for name in names:
        if name not in values:
            raise ValueError(f"prompt: no placeholder {{{name}}}: {hint(name, values)}; write {{{{ and }}}} for braces")
    return prompt.format_map(values)


def _harmless(family: str, text: str) -> bool:
    """Whether evaluating `text` can only compute. It may compute for ever: the time limit is for that."""
    if family in _EVAL:
        return _is_literal(text)
    if family in _PARSE_EXPR:
        return _is_formula(text)
    return True


def _may_be_right(family: str, text: str, wanted: str) -> bool:
    """Whether `text` is none of the wrong answers that a scorer is known to give 1."""
    if family == "game_of_life_halting":  # any answer at all
        return text.casefold() == wanted.casefold()
    if family == "coin_flip":  # the first digits, such as 0
        return _is_close(text, wanted)
    return family not in _FLOAT or re.search("nan|inf", text.replace(" ", ""), re.IGNORECASE) is None


def _is_close(text: str, wanted: str) -> bool:
    try:
        return abs(Fraction(text.replace(",", "")) - Fraction(wanted)) <= 1e-4  # what the scorer of coin_flip wants
    except (ValueError, ZeroDivisionError):
        return False


def _is_literal(text: str) -> bool:
    """Whether eval() refuses `text`, or makes lists of constants of it."""
    try:
        tree = ast.parse(text.lstrip(" \t"), mode="eval")  # eval() takes these off, and ast.parse refuses them
    except (SyntaxError, ValueError):
        return True
    except (MemoryError, RecursionError):  # too deep for a tree, but perhaps not for eval()
        return False
    return all(isinstance(node, _LITERAL) for node in ast.walk(tree))


def _is_formula(text: str) -> bool:
    # sympy changes the text before it evaluates it, in ways that need no more than these characters to be plain.
    if re.fullmatch(r"[-+*/^()., \t\r\n0-9A-Za-z]*", text) is None:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return all(map(_is_arithmetic, nodes))


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.Name):
        return len(node.id) == 1 or node.id in _FUNCTIONS
    return isinstance(node, _FORMULA)
