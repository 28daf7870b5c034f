"""Answers that reasoning-gym would run as code are never run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sympy.parsing.sympy_parser import parse_expr

from tbrm.tasks import reasoning_gym_process as inner
from tests.tbrm.tasks.test_reasoning_gym import make


def opens(path: Path) -> str:
    """A Python expression that makes the file at `path`, without the quotes and underscores that look like code."""
    return f"open({'+'.join(f'chr({ord(letter)})' for letter in str(path))}, chr(119))"


def opens_without_parentheses(path: Path) -> str:
    """The same by a subscript: a class that we can reach is made to call exec() for it."""
    code = f"open({str(path)!r}, 'w')".replace("(", "\\x28").replace(")", "\\x29")
    return f'[quit["{code}"] for quit.__class__.__getitem__ in [exec]]'


@pytest.fixture
def quitter() -> Iterator[None]:
    """Takes back what `opens_without_parentheses` does to a class of the interpreter."""
    yield
    if hasattr(type(quit), "__getitem__"):
        del type(quit).__getitem__


@pytest.mark.parametrize("family", sorted(inner._EVAL | inner._PARSE_EXPR))
@pytest.mark.parametrize("form", ["{}", "[{}]", "1 + {}", " \t{}", "1 if {} else 2", "[*{}]", "{{1: {}}}"])
@pytest.mark.parametrize("code", [opens, opens_without_parentheses])
def test_answers_are_never_run_as_code(
    family: str, form: str, code: Callable[[Path], str], tmp_path: Path, quitter: None
) -> None:
    """In this process, where no sandbox would prevent it."""
    path = tmp_path / "made"
    text = form.format(code(path))
    assert not inner._harmless(family, text)
    assert inner.score(family, "{}", 0, "whole", text) == 0
    assert not path.exists()


@pytest.mark.parametrize("code", [opens, opens_without_parentheses])
def test_the_code_of_the_test_above_does_run_where_nothing_prevents_it(
    code: Callable[[Path], str], tmp_path: Path, quitter: None
) -> None:
    eval(code(tmp_path / "made"))
    assert (tmp_path / "made").exists()


def test_sympy_would_run_code_too(tmp_path: Path) -> None:
    parse_expr(opens(tmp_path / "made"))
    assert (tmp_path / "made").exists()


LITERALS = [
    "[[0, 1], [1, 0]]",
    "['Q', '_']",
    "(1, -2.5, +3j)",
    "{1: [None, True]}",
    "",
    "1 2\n3 4",
    "_ Q _",
    "no python",
]
NO_LITERALS = [
    "x",
    "[x]",
    "x[0]",
    "x.y",
    "f()",
    "1 + 1",
    "~1",
    "not 1",
    "[i for i in [1]]",
    "lambda: 1",
    "f'{x}'",
    "{1, 2}",
]


@pytest.mark.parametrize("text", LITERALS)
def test_lists_of_constants_and_what_python_refuses_are_let_through(text: str) -> None:
    assert inner._harmless("n_queens", text)


@pytest.mark.parametrize(
    "text", [*NO_LITERALS, "[" * 150 + "f()" + "]" * 150, "[(y := 1)]", "{**x}", "[*x]", "await x"]
)
def test_nothing_else_that_python_would_evaluate_is(text: str) -> None:
    assert not inner._harmless("n_queens", text)


FORMULAS = [
    "(1+2)*3/4",
    "2**3",
    "x^2 - 3*x",
    "-sin(x)",
    "exp(2*x)/2",
    "log(x, 10)",
    "Integral(x, (x, 0, 1))",
    "1e5*x + C",
]
NO_FORMULAS = [
    "pi.free",
    "x.y",
    "1 .real",
    "x[0]",
    "lambda x: x",
    "'x'",
    "a_b",
    "Symbol(x)",
    "é",
    "S(x)",
    "N(1, 9)",
    "x(1)",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_arithmetic_is_let_through(text: str) -> None:
    assert inner._harmless("countdown", text)


@pytest.mark.parametrize("text", [*NO_FORMULAS, "sin(x)(y)", "sin.f(x)", "x if x else x", "sin(x=1)", "1 # \n f()"])
def test_formulas_hold_nothing_but_numbers_operators_and_known_names(text: str) -> None:
    assert not inner._harmless("countdown", text)


@pytest.mark.parametrize("family", sorted(inner._EVAL | inner._PARSE_EXPR))
def test_the_guard_lets_right_answers_through(family: str) -> None:
    task = make(family=family, answer="whole", timeout_seconds=60)
    problems = [task.problem(index, seed=1) for index in range(6)]
    assert all(grade.correct for grade in task.grade(problems, [problem.answer for problem in problems]))
