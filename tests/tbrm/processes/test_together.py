"""Three real processes: some without work, one that fails, one that was told something else (see together.py)."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.tbrm.processes.together import PROMPTS
from tests.tbrm.started import forked

RANKS = range(3)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    folder = tmp_path_factory.mktemp("together")
    forked(3, "tests.tbrm.processes.together", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in RANKS]


@pytest.mark.parametrize("prompts", PROMPTS)
def test_processes_without_a_prompt_take_part_and_no_step_gathers_more_for_it(
    found: list[dict[str, Any]], prompts: int
) -> None:
    of_ranks = [each["generated"] for each in found]
    for generated in of_ranks:
        answered = generated[str(prompts)]
        assert len(answered["answers"]) == len(answered["graded"]) == prompts
        assert answered["answers"] == of_ranks[0][str(prompts)]["answers"]
        assert answered["graded"] == [sum(ids) for [ids] in answered["answers"]]
        assert answered["gathers"] == answered["later"] == generated["plain"] > 0


def test_what_fails_on_one_process_fails_on_all_with_its_own_error(found: list[dict[str, Any]]) -> None:
    for rank in RANKS:
        failures = found[rank]["failures"]
        assert failures["on main"] == ["ConfigError", "run.dir: no"]
        assert failures["on main, of the disk"] == ["OSError", "[Errno 28] No space left: 'a/b'"]
        assert failures["on main, stubborn"] == (
            ["Stubborn", "held"] if rank == 0 else ["RuntimeError", "Stubborn: held"]
        )
        assert failures["of one's share"] == ["ValueError", "a bad answer"]
        assert failures["none"] == []


def test_a_checkpoint_is_read_once_for_all_processes(found: list[dict[str, Any]]) -> None:
    assert [found[rank]["late file system"] for rank in RANKS] == [[], [], []]


def test_recorded_lines_are_graded_once_for_all_processes(found: list[dict[str, Any]]) -> None:
    assert [found[rank]["recorded"] for rank in RANKS] == [[0.0]] * 3


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("a rate", "optim.learning_rate is 0.001 on rank 1 (HOST) and 0.0001 on rank 0 (HOST). Start all"),
        ("a task's key", "evaluation.prompts is 6 on rank 2 (HOST) and 5 on rank 0 (HOST). Start all"),
        (
            "--resume",
            "--resume is False on rank 1 (HOST) and True on rank 0 (HOST); --resume is False on rank 2 (HOST) and",
        ),
        ("a file", "what is in data.trajectories is "),
    ],
)
def test_processes_that_were_not_told_the_same_are_refused_by_what_differs(
    found: list[dict[str, Any]], what: str, named: str
) -> None:
    for rank in RANKS:
        assert found[rank]["disagreements"]["nothing"] == []
        kind, message = found[rank]["disagreements"][what]
        assert kind == "ConfigError"
        assert "not told the same: " + named.replace("HOST", socket.gethostname()) in message
    if what == "a file":
        assert "on rank 2" in message and "rank 1" not in message  # which has the main one's copy
