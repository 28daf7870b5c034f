from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbrm.tasks.answers import EXTRACTORS, answer_tag, boxed, last_number, whole


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("12 + 30 = 42", "42"),
        ("= -42", "-42"),
        ("=-42", "-42"),
        ("\u221242", "-42"),  # the typographic minus
        ("+42", "42"),
        ("**-42**", "-42"),
        ("5-3", "3"),  # an operator, not a sign
        ("(x)-3", "3"),
        ("from 3-5 days", "5"),
        ("1,234,567.50 dollars", "1234567.50"),
        ("1,2", "2"),  # not thousands
        ("1,2345", "2345"),
        ("12,345,6", "6"),
        ("$1,000", "1000"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("€7.", "7"),
        ("50%", "50"),
        ("50\\%", "50"),
        ("007", "7"),
        ("-000.50", "-0.50"),
        ("000", "0"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("so...5", "5"),
        ("3.14.", "3.14"),
        ("1e3", "1e3"),
        ("1.5E-3", "1.5E-3"),
        ("2e", "2"),
        ("15 cm2", "15"),
        ("15 m^2", "15"),
        ("H2O", None),
        ("答案是5", "5"),  # no spaces in Chinese
        ("\\boxed{-3}", "-3"),
        ("7 and ٣", "7"),  # other scripts' digits are not read
        ("", None),
        ("none", None),
        ("-", None),
        ("$", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@given(
    value=st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3),
    before=st.sampled_from(["", "so ", "= ", "12 + 3 = ", "$", "costs: ", "\n"]),
    after=st.sampled_from(["", ".", " ", "%", "\n", " apples.", "!", "$", "**"]),
    style=st.sampled_from(["f", ",f", "+f", "020f"]),
)
def test_last_number_reads_back_what_was_written(value: Decimal, before: str, after: str, style: str) -> None:
    found = last_number(f"{before}{value:{style}}{after}")
    assert found is not None
    assert Decimal(found) == value
    assert last_number(found) == found  # plain notation stays as it is


@given(st.text(max_size=200))
def test_last_number_of_any_text_is_a_decimal(text: str) -> None:
    found = last_number(text)
    assert found is None or Decimal(found).is_finite()


@given(st.text(alphabet="0123456789,.-+$eE% x^", max_size=60))
def test_last_number_of_number_like_text_is_a_decimal(text: str) -> None:
    found = last_number(text)
    assert found is None or Decimal(found).is_finite()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 5 </answer>", "5"),
        ("<answer>1</answer> no, <answer>2</answer>.", "2"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer>5", None),
        ("5</answer>", None),
        ("</answer><answer>", None),
        ("<answer>1</answer><answer>2", "1"),
        ("5", None),
    ],
)
def test_answer_tag(text: str, answer: str | None) -> None:
    assert answer_tag(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} or \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} }", r"\{1, 2\}"),
        (r"\boxed{\frac{1}{2}", None),
        ("boxed{5}", None),
        ("\\boxed{a\\", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


def test_whole_is_stripped() -> None:
    assert whole(" 5\n") == "5"


@pytest.mark.parametrize(
    "piece", ["1", "1,", ",111", "-", ".", "$", "1.", "<answer>", "</answer>", "\\boxed{", "{", "\\", "e1", "a "]
)
@pytest.mark.parametrize("name", EXTRACTORS)
def test_a_million_characters_are_read(name: str, piece: str) -> None:
    """Each piece is the worst case of some pattern: anything quadratic would take hours here."""
    EXTRACTORS[name](piece * (10**6 // len(piece)))  # type: ignore[index]
