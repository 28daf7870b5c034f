"""Every scorer of reasoning-gym was read for what it does with a response, and is read again when it changes.

`reasoning_gym_scorers.txt` holds a line for each family: the hash of the scorer with all that it calls in reasoning-gym, and
what was found. After an upgrade: read the scorers that the test names, then correct their lines."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from tbrm.tasks import reasoning_gym_process as inner
from tbrm.tasks.reasoning_gym import ReasoningGym

FOUND = Path(__file__).with_name("reasoning_gym_scorers.txt")
ROOT = Path(reasoning_gym.__file__).parent

EXECUTES = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "import_module",
    "parse_expr",
    "sympify",
    "S",
    "parse_latex",
    "lambdify",
}
READS = {"pickle", "marshal", "shelve", "dill", "yaml", "subprocess", "importlib", "ctypes"}


def is_theirs(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").startswith("reasoning_gym")


def called(function: Any, family: type) -> Iterator[Any]:
    """The functions of reasoning-gym that the names in `function` may stand for."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Name):
            found = function.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute):
            module = function.__globals__.get(node.value.id) if isinstance(node.value, ast.Name) else None
            found = getattr(module, node.attr, None) or getattr(family, node.attr, None)
        else:
            continue
        yield from vars(found).values() if inspect.isclass(found) and is_theirs(found) else [found]


def digest(family: type) -> str:
    """Of the scorer's source, and of all of reasoning-gym that it may call."""
    sources: dict[Any, str] = {}
    waiting = [family.score_answer]
    while waiting:
        function = inspect.unwrap(getattr(waiting[-1], "__func__", waiting[-1]))
        waiting.pop()
        written = (
            inspect.isfunction(function) and function.__code__.co_filename != "<string>"
        )  # as those of dataclasses
        if written and is_theirs(function) and function not in sources:
            sources[function] = inspect.getsource(function)
            waiting += called(function, family)
    return hashlib.sha256("".join(sorted(sources.values())).encode()).hexdigest()[:12]


def found() -> dict[str, tuple[str, str]]:
    lines = [line.split(maxsplit=2) for line in FOUND.read_text().splitlines()]
    return {family: (hash_, what) for family, hash_, what in lines}


def test_every_scorer_was_read() -> None:
    read = {family: hash_ for family, (hash_, _) in found().items()}
    now = {family: digest(dataset) for family, (dataset, _) in DATASETS.items()}
    unread = {family: hash_ for family, hash_ in now.items() if read.get(family) != hash_}
    assert not unread, f"read these scorers, then correct {FOUND.name}: {unread}"
    assert read.keys() == now.keys()


def test_families_whose_scorer_evaluates_the_response_are_guarded() -> None:
    kinds = {what: {family for family, (_, each) in found().items() if each == what} for what in ("eval", "parse_expr")}
    assert kinds["eval"] == inner._EVAL
    assert kinds["parse_expr"] == inner._PARSE_EXPR


JUNK = ["nan", "n a n", "nan+nanj", "inf", "I do not know", "yes", "0", "1", "-", "None", "()", "[]", "{}"]


def same(text: str, wanted: str | None) -> bool:
    """As text, case aside, or as numbers."""
    if wanted is None or text.casefold() == wanted.casefold():
        return wanted is not None
    try:
        return Decimal(text) == Decimal(wanted)
    except InvalidOperation:
        return False


@pytest.mark.parametrize("family", sorted(DATASETS.keys() - {"composite"}))
def test_junk_is_right_only_where_it_is_the_answer(family: str) -> None:
    """A model that finds one of these would be rewarded on every problem."""
    for position in range(2):
        wanted = inner._item(family, "{}", position)["answer"]
        for text in JUNK:
            value = 0.0
            with contextlib.suppress(Exception):  # a failure, without a reward
                value = inner.score(family, "{}", position, "whole", text)
            assert value < 1 or same(text, wanted), (text, wanted)


@pytest.mark.parametrize(
    ("family", "position", "right", "wrong"),
    [
        ("game_of_life_halting", 0, ["True", "true"], ["False", "halts", "1"]),
        ("coin_flip", 1, ["0.3125", "5/16", "0.31249"], ["0", "0.3", "0.31", "no"]),
    ],
)
def test_scorers_that_are_mended(family: str, position: int, right: list[str], wrong: list[str]) -> None:
    assert [inner.score(family, "{}", position, "whole", text) for text in right] == [1.0] * len(right)
    assert [inner.score(family, "{}", position, "whole", text) for text in wrong] == [0.0] * len(wrong)


def sources_with(words: set[str], before: str = "") -> Iterator[tuple[str, ast.Module]]:
    """The files of reasoning-gym, by name, that hold one of the words, before a certain sign."""
    for path in ROOT.rglob("*.py"):
        if re.search(rf"\b({'|'.join(words)})\b{before}", source := path.read_text()):
            yield str(path.relative_to(ROOT).with_suffix("")), ast.parse(source)


def test_every_place_that_may_execute_text_is_known() -> None:
    """In all of reasoning-gym, whether a scorer is seen to lead there or not."""
    places = set()
    for file, tree in sources_with(EXECUTES, r"\("):
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)} - {
                    "re.compile"
                }
                names = {call.rpartition(".")[2] for call in calls} & EXECUTES
                places |= {f"{file} {function.name} {name}" for name in names}
    evaluates = {
        "algorithmic/binary_matrix score_answer eval",
        "algorithmic/spiral_matrix score_answer eval",
        "algorithmic/string_insertion score_answer eval",
        "games/n_queens score_answer eval",
        "algebra/intermediate_integration score_answer parse_expr",
        "algebra/polynomial_multiplication score_answer parse_expr",
        "algebra/simple_integration score_answer parse_expr",
        "games/countdown score_answer parse_expr",
        "games/puzzle24 score_answer parse_expr",
    }
    makes_problems = {
        "arithmetic/basic_arithmetic eval_floordiv eval",
        "arithmetic/bitwise_arithmetic generate_problem eval",
        "arithmetic/gsm_symbolic/generators_00_49 generate_32 eval",
        "arithmetic/gsm_symbolic/generators_00_49 generate_example eval",
        "arithmetic/gsm_symbolic/generators_50_99 generate_69 eval",
        "arithmetic/gsm_symbolic/generators_50_99 generate_from_variables eval",
        "code/bf compile_bfit_code_to_bf compile",
        "code/codeio _generate_io_pair exec",
        "code/contrib/bfit/BF-it compile_file compile",
        "code/contrib/bfit/Compiler/Compiler compile compile",
    }
    evaluates_its_own_problem = {
        "algorithmic/number_sorting score_answer eval",
        "arithmetic/bitwise_arithmetic verify_solution eval",
    }
    parses_by_itself = {
        "logic/propositional_logic from_string parse_expr",
        "logic/propositional_logic parse_expr parse_expr",
    }
    assert places == evaluates | makes_problems | evaluates_its_own_problem | parses_by_itself


def test_no_module_imports_what_could_execute_files() -> None:
    importing = set()
    for file, tree in sources_with(READS):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                importing |= {f"{file} {name}" for name in names if name.partition(".")[0] in READS}
    assert importing == {"coaching/curriculum_config yaml", "composite yaml", "data/__init__ importlib"}


def test_a_composite_of_families_cannot_be_asked_for() -> None:
    """Its scorer hands responses on to those of other families, past the guard."""
    with pytest.raises(ValueError, match="params: composite does not accept"):
        ReasoningGym(
            name="reasoning_gym",
            family="composite",
            answer="whole",
            params={"datasets": [{"name": "spiral_matrix", "weight": 1.0, "config": {}}]},
        )
