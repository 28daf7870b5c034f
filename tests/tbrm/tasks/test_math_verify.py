from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path

import pytest

from tbrm.tasks import Grade, Problem
from tbrm.tasks.answers import Convention
from tbrm.tasks.file import FileTask
from tbrm.tasks.verifiers import Verifier, make_verifier

RIGHT, WRONG = Grade(1.0, True), Grade(0.0, False)


@pytest.fixture(scope="module")
def patient() -> Verifier:
    return make_verifier("math_verify", {"timeout_seconds": 60})


def grade(verify: Verifier, *pairs: tuple[str, str]) -> list[Grade]:
    return verify([Problem("?", answer) for answer, _ in pairs], [response for _, response in pairs])


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        ("42", "The answer is 42", True),
        ("42", "The answer is 43", False),
        ("1/2", "$0.5$", True),
        (r"\frac{1}{2}", r"\boxed{\frac12}", True),
        (r"$\frac{1}{2}$", "so 1/2", True),
        ("x^2+1", "$1+x^2$", True),  # a reference without delimiters is all mathematics,
        ("x^2+1", "1", False),  # not the number it ends in
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
        (r"\{1,2\}", r"$\{2,1\}$", True),
        ("50%", "50%", True),
        (r"\$50", "50", True),
        ("1,234", "1234", True),
        ("42", "", False),
        ("42", r"\boxed{", False),
    ],
)
def test_equality_is_mathematical(patient: Verifier, answer: str, response: str, correct: bool) -> None:
    assert grade(patient, (answer, response)) == [RIGHT if correct else WRONG]


@pytest.mark.slow
def test_responses_that_hang_the_grader_get_nothing_and_grading_goes_on() -> None:
    verify = make_verifier("math_verify", {"timeout_seconds": 4, "answer": "anywhere"})
    slow = Grade(0.0, False, "math_verify: took longer than 4 seconds")
    grades = grade(
        verify,
        ("42", "42"),
        ("42", "$9^{9^{9^{9}}}$"),  # comparing it never ends
        ("42", "1 " * 10**5),  # finding the answer in it takes a regular expression minutes
        ("42", "$42$"),
        ("42", "42"),
    )
    assert grades == [RIGHT, slow, slow, RIGHT, RIGHT]


def test_grading_works_off_the_main_thread(patient: Verifier) -> None:
    grades: list[Grade] = []
    thread = threading.Thread(target=lambda: grades.extend(grade(patient, ("42", "$42$"), ("1/2", "0.5"))))
    thread.start()
    thread.join()
    assert grades == [RIGHT, RIGHT]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "is empty, or its box is never closed"),
        (" ", "is empty, or its box is never closed"),
        (r"\boxed{", "is empty, or its box is never closed"),
        ("nonsense words", r"is words and no mathematics: write \\text\{nonsense words\} if"),
        (r"\frac{1}{0}", "divides by zero"),
        (r"$\dfrac{x}{ 0 }$", "divides by zero"),
        ("1/0", "divides by zero"),
    ],
)
def test_a_reference_that_nothing_equals_is_refused_when_it_is_read(tmp_path: Path, answer: str, why: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": "?", "answer": each}) + "\n" for each in ("1/0.5", answer)))
    with pytest.raises(ValueError, match=rf"data\.jsonl:2: verifier math_verify: the answer .* {why}"):
        FileTask(name="file", path=str(path), verifier="math_verify")


def test_a_reference_that_cannot_be_parsed_is_a_failure(patient: Verifier) -> None:
    (only,) = grade(patient, ("", "3"))
    assert only == Grade(0.0, False, "math_verify: ValueError: the reference answer '' cannot be parsed")


def test_a_million_characters_are_graded(patient: Verifier) -> None:
    assert grade(patient, ("42", "x" * 10**6), ("42", "x" * 10**6 + " $42$")) == [WRONG, RIGHT]


def test_a_missing_math_verify_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(
        ValueError, match=r"verifier math_verify needs the package math-verify: pip install 'tbrm\[math\]'"
    ):
        make_verifier("math_verify", {})


HOSTILE = [
    "__import__('os').system('id')",
    "$__import__('os').system('id')$",
    r"\boxed{__import__('os').system('id')}",
    r"\boxed{\text{exec}(1)}",
    r"$\operatorname{eval}(x)$ and $\mathrm{exit}(1)$",
    r"$\variable{__import__('os')}$",
    "the final answer is 1+exec('x')",
    "answer: 3*(1).__class__",
    "2*3+open('x')",
    "1 +.real(2)",
    "(1)(2)/3 - x.y",
    "$x=\\lambda: 1$",
]


@pytest.mark.parametrize("convention", ["boxed_or_last", "anywhere"])
@pytest.mark.parametrize("response", HOSTILE)
def test_of_a_response_sympy_evaluates_nothing_but_numbers_and_operators(
    response: str, convention: Convention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is evaluated, by math-verify itself or by sympy where it is given text, is written as Python first."""
    import sympy.physics.units  # noqa: F401  (which writes names of its own as Python when it is imported)
    from math_verify.parser import parse_expr_cached
    from sympy.parsing import sympy_parser

    from tbrm.tasks.verifiers.math_verify_process import equal

    parse_expr_cached.cache_clear()
    texts: list[str] = []
    real = sympy_parser.stringify_expr

    def stringify(text: str, *others: object) -> str:
        texts.append(text)
        return str(real(text, *others))

    monkeypatch.setattr(sympy_parser, "stringify_expr", stringify)
    equal(["$x+1$"], response, convention, "required_closed")
    equal(["6"], "2*3 = 6, so 1+5", "anywhere", "ignored")  # that one is
    assert texts
    assert [text for text in texts if not re.fullmatch(r"[\d\s.+*/()-]*", text)] == []
