"""The pairs of answer_pairs.yaml, graded by math_verify, and those of options by choice too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tbrm.tasks import Problem
from tbrm.tasks.verifiers import Verifier, make_verifier

KINDS: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("answer_pairs.yaml").read_text())
OPTIONS = "the letter of an option"


def wrong(verify: Verifier, pairs: list[tuple[Any, str, bool]]) -> list[str]:
    """Those that are graded otherwise than they say."""
    golds = [answer if isinstance(answer, list) else [answer] for answer, _, _ in pairs]
    problems = [Problem("?", gold[0], alternatives=tuple(gold[1:])) for gold in golds]
    for problem in problems:
        verify.check_problem(problem)
    grades = verify(problems, [response for _, response, _ in pairs])
    return [
        f"{answer} | {response} | {grade}"
        for (answer, response, right), grade in zip(pairs, grades, strict=True)
        if grade.correct != right or grade.failure
    ]


@pytest.mark.parametrize("kind", KINDS, ids=[kind["kind"] for kind in KINDS])
def test_a_kind_is_graded_as_its_pairs_say(kind: dict[str, Any]) -> None:
    assert kind["source"]
    assert wrong(make_verifier("math_verify", {"timeout_seconds": 60}), kind["pairs"]) == []


def test_the_letter_of_an_option_is_read_alike_by_choice() -> None:
    (options,) = [kind for kind in KINDS if kind["kind"] == OPTIONS]
    assert wrong(make_verifier("choice", {}), options["pairs"]) == []


def test_there_are_many_pairs_and_none_twice() -> None:
    pairs = [(str(answer), response) for kind in KINDS for answer, response, _ in kind["pairs"]]
    assert len(pairs) == len(set(pairs)) >= 150
