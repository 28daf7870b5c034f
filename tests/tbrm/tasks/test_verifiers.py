from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tbrm.tasks import Grade, Problem
from tbrm.tasks.verifiers import VERIFIERS, make_verifier
from tbrm.tasks.verifiers.exact import Exact

RIGHT, WRONG = Grade(1.0, True), Grade(0.0, False)


def problems(*answers: str) -> list[Problem]:
    return [Problem("?", answer) for answer in answers]


def test_exact() -> None:
    verify = make_verifier("exact", {})
    grades = verify(problems("Paris", " Paris", "Paris", "Paris", "5"), ["Paris\n", "Paris", "paris", "in Paris", ""])
    assert grades == [RIGHT, RIGHT, WRONG, WRONG, WRONG]


def test_exact_of_a_part_of_the_response() -> None:
    verify = make_verifier("exact", {"answer": "answer_tag"})
    grades = verify(problems("Paris", "Paris"), ["It is <answer>Paris</answer>.", "Paris"])
    assert grades == [RIGHT, WRONG]


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        ("42", "The answer is 42.", True),
        ("42", "42.0", True),
        ("42", "0042", True),
        ("1000", "$1,000", True),
        ("1,000", "1000", True),
        ("50", "50%", True),
        ("-3", "-3", True),
        ("3", "-3", False),
        ("0.1", ".10", True),
        ("100", "1e2", True),
        ("0.3", "0.30000000000000001", False),  # decimals are compared, not floats
        ("3 + 4 = 7\n#### 7", "so 7", True),  # as GSM8K has its answers
        ("42", "42 or 43", False),
        ("42", "no idea", False),
        ("0", "-0", True),
    ],
)
def test_last_number(answer: str, response: str, correct: bool) -> None:
    assert make_verifier("last_number", {})(problems(answer), [response]) == [RIGHT if correct else WRONG]


@pytest.mark.parametrize("name", ["exact", "last_number", "math_verify", "choice"])
def test_reasoning_that_is_never_closed_holds_no_answer(name: str) -> None:
    answer = "B" if name == "choice" else "4"
    asked = problems(*[answer] * 3)
    said = [f"<think>hm, {answer}</think>{answer}", f"<think>\n{answer}", f"<think>{answer}</think>"]
    assert make_verifier(name, {})(asked, said) == [RIGHT, WRONG, WRONG]
    lenient = {} if name == "exact" else {"thinking": "ignored"}
    assert make_verifier(name, lenient)(asked[:1], [f"<think>\n{answer}"]) == [WRONG if name == "exact" else RIGHT]


def test_each_of_several_answers_is_right() -> None:
    two = [Problem("?", "1", alternatives=("2",))] * 3
    for name in ("exact", "last_number", "math_verify"):
        assert make_verifier(name, {})(two, ["1", "2", "3"]) == [RIGHT, RIGHT, WRONG]


def test_a_choice_by_letter_or_by_text() -> None:
    asked = {"options": ["Rome", "Paris", "a city of the South, in Italy"]}
    verify = make_verifier("choice", {"options_column": "options"})
    by_letter, by_text = Problem("?", "B", asked), Problem("?", "Paris", {"options": {"A": "Rome", "B": "Paris"}})
    for problem in (by_letter, by_text):
        verify.check_problem(problem)
        said = ["B", "(b)", "Paris", "**paris.**", r"\boxed{\text{Paris}}", "Rome", "A", "C", "Paris or Rome"]
        assert [grade.correct for grade in verify([problem] * 9, said)] == [True] * 5 + [False] * 4
    assert verify([by_letter], ["I find \\boxed{E = mc^2}.\n**Answer: B**"]) == [RIGHT]  # the box is no choice


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            Problem("?", "D", {"options": ["x", "y"]}),
            r"the answer 'D' is none of the letters and texts of the options",
        ),
        (Problem("?", "z", {"options": ["x", "y"]}), r"the answer 'z' is none of"),
        (Problem("?", "A", {"option": ["x", "y"]}), r"no column 'options' \(options_column\): did you mean 'option'\?"),
        (
            Problem("?", "A", {"options": "x, y"}),
            r"column 'options' holds 'x, y', and options are a list of 2 to 10 texts",
        ),
        (Problem("?", "A", {"options": {"1": "x", "2": "y"}}), r"options are a list of 2 to 10 texts, or"),
    ],
)
def test_a_choice_that_cannot_be_graded_is_an_error(problem: Problem, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_verifier("choice", {"options_column": "options"}).check_problem(problem)


def test_last_number_of_long_numbers() -> None:
    digits = "7" * 10**6
    verify = make_verifier("last_number", {})
    assert verify(problems("7", digits), [digits, digits]) == [WRONG, RIGHT]


def test_each_response_needs_its_problem() -> None:
    for name in ("exact", "last_number", "math_verify"):
        with pytest.raises(ValueError, match="zip"):
            make_verifier(name, {})(problems("1"), ["1", "2"])


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    source = """
        def lengths(completions, **kwargs):
            return [float(len(completion)) for completion in completions]

        def matches(prompts, completions, difficulty, solution, **kwargs):
            assert set(kwargs) == {"completion_ids", "trainer_state"}
            return [None if d is None else float(c == s) for c, d, s in zip(completions, difficulty, solution)]

        seen = {}

        def sees(prompts, completions, **kwargs):
            seen.update(prompts=prompts, completions=completions, **kwargs)
            return [0.5] * len(prompts)

        def strict(prompts, completions):
            return [1.0] * len(prompts)

        def broken(completions, **kwargs):
            return completions[0]["content"]

        def returns(value):
            return lambda **kwargs: value

        too_few, no_list, word = returns([1.0]), returns(1.0), returns([1.0, "good"])
        not_a_number, infinite = returns([1.0, float("nan")]), returns([float("inf"), 1.0])
    """
    (tmp_path / "user_rewards.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    return "user_rewards"


def test_a_reward_function_gets_text_and_columns(rewards: str) -> None:
    rows = [
        Problem("a?", "1", {"prompt": "a?", "difficulty": 1, "solution": "x"}),
        Problem("b?", "2", {"prompt": "b?", "difficulty": 2, "solution": "y"}),
        Problem("c?", "3", {"prompt": "c?", "solution": "z"}),
    ]
    grades = make_verifier(f"{rewards}:matches", {})(rows, ["x", "no", "z"])
    assert grades[:2] == [RIGHT, WRONG]
    assert grades[2] == Grade(0.0, False, "reward function user_rewards:matches: not applicable")


def test_a_reward_function_gets_messages_for_a_conversation(rewards: str) -> None:
    import importlib

    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    grades = make_verifier(f"{rewards}:sees", {})([Problem(messages, "1", {"level": 3})], ["hello"])
    assert grades == [Grade(0.5, False)]
    seen = importlib.import_module(rewards).seen
    assert seen.pop("trainer_state").global_step == 0
    assert seen == {
        "completion_ids": [None],
        "prompts": [list(messages)],
        "completions": [[{"role": "assistant", "content": "hello"}]],
        "level": [3],
    }


def test_any_reward_counts_and_one_or_more_is_correct(rewards: str) -> None:
    grades = make_verifier(f"{rewards}:lengths", {})(problems("", "", ""), ["", "a", "abc"])
    assert grades == [Grade(0.0, False), Grade(1.0, True), Grade(3.0, True)]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("broken", RuntimeError, r"reward function user_rewards:broken raised TypeError\("),
        ("strict", RuntimeError, r"strict raised TypeError\(.*got an unexpected keyword argument"),
        ("too_few", ValueError, r"too_few: wanted a list of 2 rewards, got \[1\.0\]"),
        ("no_list", ValueError, r"no_list: wanted a list of 2 rewards, got 1\.0"),
        (
            "word",
            ValueError,
            r"word: a reward must be a finite number of at most 1e\+06, got 'good'; None where there is none",
        ),
        ("not_a_number", ValueError, r"not_a_number: a reward must be a finite number of .*, got nan"),
        ("infinite", ValueError, r"infinite: a reward must be a finite number of .*, got inf"),
    ],
)
def test_a_reward_function_that_misbehaves_is_an_error(
    rewards: str, function: str, error: type[Exception], message: str
) -> None:
    verify = make_verifier(f"{rewards}:{function}", {})
    with pytest.raises(error, match=message):
        verify([Problem("?", "1", {"level": 1}), Problem("?", "2", {"level": 2})], ["a", "b"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exakt", {}, r"no verifier is called 'exakt': did you mean 'exact'\?"),
        ("exact", {"anser": "boxed"}, r"verifier_options\.anser: exact has no such option: did you mean 'answer'\?"),
        ("last_number", {"x": 1}, r"verifier_options\.x: last_number has no such option: Known: thinking"),
        ("exact", {"answer": "box"}, r"verifier_options\.answer: Input should be 'last_number'"),
        ("math_verify", {"timeout_seconds": 0}, r"verifier_options\.timeout_seconds: Input should be greater than 0"),
        ("math_verify", {"timeout_seconds": float("inf")}, r"\.timeout_seconds: Input should be a finite number"),
        ("math:pi", {}, r"verifier: math:pi is 3\.14.*a verifier is a function or a Verifier class"),
        ("math:no", {}, r"'math:no' cannot be imported"),
        ("no_such:f", {}, r"'no_such:f' cannot be imported: No module named 'no_such'"),
        ("math:sqrt", {"x": 1}, r"verifier_options: a reward function takes none"),
    ],
)
def test_wrong_names_and_options_are_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_verifier(name, options)


def test_a_verifier_class_can_be_named_by_its_import_path() -> None:
    verify = make_verifier("tbrm.tasks.verifiers.exact:Exact", {"answer": "boxed"})
    assert verify == Exact(answer="boxed")
    assert VERIFIERS("exact") is Exact


def test_grades_are_finite() -> None:
    for name in VERIFIERS.builtin.keys() - {"given"}:
        options = {"free_tokens": 1, "most_tokens": 2} if name == "length" else {}
        (grade,) = make_verifier(name, options)(problems("B"), ["nan inf"])
        assert math.isfinite(grade.reward)
