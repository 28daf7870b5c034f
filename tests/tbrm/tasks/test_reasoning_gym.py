from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from reasoning_gym.factory import create_dataset

from tbrm.tasks import Problem, ProblemStream
from tbrm.tasks.reasoning_gym import ReasoningGym


def make(**fields: Any) -> ReasoningGym:
    return ReasoningGym(name="reasoning_gym", **fields)


SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


@pytest.mark.parametrize(
    ("family", "answer"),
    [
        ("chain_sum", "last_number"),
        ("gcd", "last_number"),
        ("decimal_chain_sum", "last_number"),  # answers with decimals
        ("gsm_symbolic", "last_number"),  # picks its templates when the data set is made
        ("power_function", "last_number"),  # its configuration has no validate()
        ("word_sorting", "answer_tag"),
        ("bf", "whole"),  # prints while it makes problems
        ("countdown", "boxed"),  # its scorer evaluates the answer
        ("polynomial_multiplication", "answer_tag"),  # so does this one's
        ("spiral_matrix", "answer_tag"),
        ("list_functions", "answer_tag"),  # draws from sets
        ("pool_matrix", "whole"),  # seeds numpy, which wants seeds below 2^32
        ("mini_sudoku", "answer_tag"),
    ],
)
def test_the_answer_of_a_problem_is_right_and_another_is_not(family: str, answer: str) -> None:
    forms = {
        "last_number": "It is {}.",
        "answer_tag": "So <answer>{}</answer>",
        "boxed": r"\boxed{{{}}}",
        "whole": "{}",
    }
    task = make(family=family, answer=answer)
    problems = [*task.heldout(2), task.problem(0, seed=7)]
    responses = [forms[answer].format(problem.answer) for problem in problems]
    for grade in task.grade(problems, responses):
        assert (grade.reward, grade.correct, grade.failure) == (1.0, True, None)
    for grade in task.grade(problems, ["I do not know"] * len(problems)):
        assert (grade.reward, grade.correct) == (0.0, False)


def test_problems_are_those_of_reasoning_gym() -> None:
    task = make(params=SMALL, prompt="What is {expression} ? Give only the number.")
    theirs = create_dataset("chain_sum", **SMALL, seed=0, size=2000)
    for index in (0, 1, 1023, 1024, 1999):
        entry = theirs[index]
        problem = task.problem(index, seed=0)
        assert problem.prompt == f"What is {entry['metadata']['expression']} ? Give only the number."
        assert problem.answer == entry["answer"]


def test_a_problem_depends_on_index_and_seed_alone() -> None:
    task, other = make(), make()
    forwards = [task.problem(index, seed=3) for index in range(20)]
    backwards = [other.problem(index, seed=3) for index in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [task.problem(index, seed=4) for index in range(20)]


@pytest.mark.slow
def test_problems_do_not_depend_on_the_hash_seed_of_the_interpreter() -> None:
    program = """
        from tbrm.tasks.reasoning_gym import ReasoningGym
        task = ReasoningGym(name="reasoning_gym", family="isomorphic_strings", answer="whole")
        print([task.problem(index, seed=0).prompt for index in range(20)])
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    outputs = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env={**environment, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 5, -1])
@pytest.mark.parametrize("heldout_seed", [0, 3, -7, 2**33])
def test_training_never_uses_a_seed_of_the_held_out_items(seed: int, heldout_seed: int) -> None:
    task = make(heldout_seed=heldout_seed)
    training = [task.problem(index, seed).entry["position"] for index in (0, 1, 2**31 - 1, 2**31, 2**40)]
    heldout = [problem.entry["position"] for problem in task.heldout(5)]
    assert all(0 <= position < 2**31 for position in training)
    assert all(2**31 <= position < 2**32 for position in heldout)


def test_held_out_problems_are_distinct_repeatable_and_never_trained_on() -> None:
    task = make(params=SMALL)
    heldout = task.heldout(200)
    keys = {problem.key for problem in heldout}
    assert len(keys) == 200
    assert task.heldout(200) == heldout
    assert task.heldout(50) == heldout[:50]
    assert make(params=SMALL, heldout_seed=1).heldout(200) != heldout
    stream = ProblemStream(task, seed=0, heldout=heldout)
    trained = stream.take(1000)
    assert stream.position > 1000  # the family is small: some had to be left out
    assert not keys & {problem.key for problem in trained}


def test_a_family_with_too_few_problems_is_an_error() -> None:
    task = make(params={"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1})
    with pytest.raises(ValueError, match=r"gave 10 distinct prompts, then 1000 repeats, and evaluation wants 11"):
        task.heldout(11)
    assert len(task.heldout(10)) == 10


def test_system_message_and_prompt_template() -> None:
    problem = make(system="Be brief.", prompt="{num_terms} terms: {expression} {{x}}").problem(0, seed=0)
    entry = create_dataset("chain_sum", seed=0, size=1)[0]["metadata"]
    text = f"{entry['num_terms']} terms: {entry['expression']} {{x}}"
    assert problem.prompt == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": text})


def test_wrong_answers_get_the_scorers_value_only_if_asked() -> None:
    """chain_sum's scorer gives part of the reward to '-12' where 12 is right: one holds the other's text."""
    strict, lenient = make(params=SMALL), make(params=SMALL, partial_credit=True)
    problem = next(each for each in strict.heldout(50) if int(each.answer) > 9)
    response = f"-{problem.answer}"
    (grade,) = strict.grade([problem], [response])
    assert (grade.reward, grade.correct) == (0.0, False)
    (grade,) = lenient.grade([problem], [response])
    assert grade.reward == len(problem.answer) / len(response)
    assert not grade.correct
    (grade,) = lenient.grade([problem], [problem.answer])
    assert (grade.reward, grade.correct) == (1.0, True)


def test_what_counts_as_correct_does_not_change_the_reward() -> None:
    """ "-12" where 12 is right gets 0.67 from the scorer."""
    problem = next(each for each in make(params=SMALL).heldout(50) if int(each.answer) > 9)
    for correct_at in (1.0, 0.5):
        (grade,) = make(params=SMALL, correct_at=correct_at).grade([problem], [f"-{problem.answer}"])
        assert (grade.reward, grade.correct) == (0.0, False)
    (grade,) = make(params=SMALL, correct_at=0.5, partial_credit=True).grade([problem], [f"-{problem.answer}"])
    assert (0.5 < grade.reward < 1, grade.correct) == (True, True)


@pytest.mark.slow
def test_an_answer_that_hangs_the_scorer_is_a_failure_and_grading_goes_on() -> None:
    task = make(family="countdown", answer="whole", timeout_seconds=2)
    problems = [task.problem(index, seed=0) for index in range(2)]
    hung, fine = task.grade(problems, ["9**9**9**9", problems[1].answer])
    assert (hung.reward, hung.correct) == (0.0, False)
    assert hung.failure == "countdown's scorer: took longer than 2 seconds"
    assert fine.correct


def test_an_answer_that_makes_the_scorer_raise_is_a_failure() -> None:
    task = make(family="prime_factorization", answer="whole")
    (grade,) = task.grade([task.problem(0, seed=0)], ["two times three"])
    assert (grade.reward, grade.correct) == (0.0, False)
    assert grade.failure is not None
    assert grade.failure.startswith("prime_factorization's scorer: ValueError")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "chain_sun"}, r"family: reasoning-gym has no 'chain_sun': did you mean 'chain_sum'\? Known: ab, "),
        ({"params": {"min_term": 2}}, r"params\.min_term: chain_sum has no such parameter: did you mean 'min_terms'\?"),
        ({"params": {"seed": 2}}, r"params\.seed: tbrm sets it; .* heldout_seed"),
        ({"params": {"size": 2}}, r"params\.size: tbrm sets it"),
        (
            {"params": {"min_terms": 5, "max_terms": 2}},
            r"params: chain_sum does not accept .*: max_terms must be >= min_terms",
        ),
        ({"params": {"min_terms": "x"}}, r"params: chain_sum does not accept .*: '>' not supported"),
        ({"params": {"min_terms": {1, 2}}}, r"params: Object of type set is not JSON serializable; use numbers"),
        ({"prompt": "{expresion}"}, r"prompt: no placeholder \{expresion\}: did you mean 'expression'\?"),
        ({"prompt": r"\boxed{}"}, r"prompt: no placeholder \{\}: Known: .*; write \{\{ and \}\} for braces"),
        ({"prompt": "{"}, r"prompt: '\{': .*; write \{\{ and \}\} for braces"),
        ({"prompt": "{answer}"}, r"prompt: no placeholder \{answer\}"),
        ({"prompt": "{question.__class__}"}, r"prompt: no placeholder \{question\.__class__\}"),
        ({"family": "word_sorting"}, r"answer: last_number cannot give what word_sorting wants, such as '.*answer_tag"),
        ({"family": "graph_color"}, r"answer: last_number cannot give what graph_color wants, such as None"),
        ({"answer": "last"}, r"'last_number', 'answer_tag', 'boxed' or 'whole'"),
        ({"familly": "chain_sum"}, r"familly"),
        ({"timeout_seconds": 0}, r"greater than 0"),
    ],
)
def test_wrong_fields_are_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_a_missing_reasoning_gym_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'tbrm\[train\]'"):
        make()


def test_responses_and_problems_must_pair_up() -> None:
    task = make()
    with pytest.raises(ValueError, match="zip"):
        task.grade([task.problem(0, seed=0)], [])


def test_an_item_that_cannot_be_made_is_an_error() -> None:
    task = make()
    broken = task.model_copy(update={"params": {"min_terms": 2, "max_terms": 2, "max_digits": 0}})
    with pytest.raises(ValueError, match="reasoning-gym could not make item 5 of chain_sum: AssertionError"):
        broken.problem(5, seed=0)


def test_the_entry_is_small_and_plain() -> None:
    problem: Problem = make().problem(3, seed=1)
    assert json.loads(json.dumps(problem.entry)) == {"family": "chain_sum", "position": 1_000_006}
