from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbrm.tasks import Grade, Problem, ProblemStream
from tbrm.tasks.file import FileTask
from tbrm.tasks.verifiers import Verifier

ROWS = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1), "level": n % 3} for n in range(20)]


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make(path: Path, **fields: Any) -> FileTask:
    return FileTask(**{"name": "file", "path": str(path), "verifier": "last_number", **fields})


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_become_problems_and_are_graded(tmp_path: Path, suffix: str) -> None:
    task = make(write(tmp_path / f"data{suffix}", ROWS))
    problems = [task.problem(index, seed=0) for index in range(20)]
    assert {problem.entry["prompt"] for problem in problems} == {row["prompt"] for row in ROWS}
    for problem in problems:
        assert problem.prompt == problem.entry["prompt"]
        assert problem.answer == problem.entry["answer"]
    grades = task.grade(problems[:2], [f"It is {problems[0].answer}.", "I do not know."])
    assert grades == [Grade(1.0, True), Grade(0.0, False)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations(tmp_path: Path, suffix: str) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "1+1?"},
    ]
    path = write(tmp_path / f"data{suffix}", [{"chat": messages, "result": 2}])
    task = make(path, prompt_column="chat", answer_column="result", system="Be brief.")
    problem = task.problem(0, seed=0)
    assert problem.prompt == ({"role": "system", "content": "Be brief."}, *messages)
    assert problem.answer == "2"
    plain = make(path, prompt_column="chat", answer_column="result").problem(0, seed=0)
    assert plain.prompt == tuple(messages)


def test_a_system_message_before_text(tmp_path: Path) -> None:
    problem = make(write(tmp_path / "data.jsonl", ROWS[:1]), system="Be brief.").problem(0, seed=0)
    assert problem.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 0 + 1?"},
    )


@given(seed=st.integers(), epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_permutation_that_depends_on_index_and_seed_alone(
    tmp_path_factory: pytest.TempPathFactory, seed: int, epoch: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "permutation.jsonl"
    if not path.exists():
        write(path, ROWS)
    task = make(path)
    indices = range(20 * epoch, 20 * epoch + 20)
    forwards = [task.problem(index, seed).entry["prompt"] for index in indices]
    assert set(forwards) == {row["prompt"] for row in ROWS}
    again = make(path)
    assert [again.problem(index, seed).entry["prompt"] for index in reversed(indices)] == forwards[::-1]


def test_epochs_and_seeds_have_different_orders(tmp_path: Path) -> None:
    task = make(write(tmp_path / "data.jsonl", ROWS))

    def order(seed: int, epoch: int) -> tuple[str, ...]:
        return tuple(task.problem(20 * epoch + place, seed).answer for place in range(20))

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_the_last_rows_are_held_out(tmp_path: Path) -> None:
    task = make(write(tmp_path / "data.jsonl", ROWS), heldout_rows=5)
    heldout = task.heldout(5)
    assert [problem.entry for problem in heldout] == ROWS[15:]
    assert task.heldout(3) == heldout[:3]
    trained = {task.problem(index, seed=0).key for index in range(60)}
    assert len(trained) == 15
    assert not trained & {problem.key for problem in heldout}


def test_held_out_problems_are_never_trained_on_however_their_rows_show_them(tmp_path: Path) -> None:
    """Repeats of the last 20, as they are, in other white space, and as conversations; and whatever is evaluated."""
    held = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    spaced = [{**row, "prompt": f" {row['prompt']}\n"} for row in held]
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in held]
    others = [{"prompt": f"What is {n} + 2?", "answer": str(n + 2)} for n in range(5)]
    task = make(write(tmp_path / "data.jsonl", held + spaced + others + chats + held), heldout_rows=20)
    assert {task.problem(index, seed=0).prompt for index in range(50)} == {row["prompt"] for row in others}
    [note] = task.notes()
    assert note.startswith("task: 60 of 65 training rows of ")
    assert len(task.heldout(20)) == len({problem.key for problem in task.withheld(0)}) == 20
    assert make(write(tmp_path / "few.jsonl", others), heldout_rows=1).notes() == []
    all_of_them = make(write(tmp_path / "same.jsonl", held), heldout_path=str(tmp_path / "same.jsonl"))
    assert len(all_of_them.heldout(20)) == 20
    with pytest.raises(ValueError, match=r"every problem of .*same.jsonl is held out: none left to train on"):
        all_of_them.problem(0, seed=0)


def test_what_no_template_shows_of_a_message_makes_no_other_problem(tmp_path: Path) -> None:
    def conversation(n: int, row: int) -> list[dict[str, Any]]:
        call = {"id": f"call-{row}", "type": "function", "function": {"name": "add", "arguments": f"{n}, 1"}}
        return [
            {"role": "user", "content": f"What is {n} + 1?", "id": row, "timestamp": row / 7, "tool_calls": []},
            {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": f"Thought {row}."},
            {"role": "tool", "content": str(n + 1), "tool_call_id": f"call-{row}", "weight": row},
        ]

    rows = [{"prompt": conversation(row % 4, row), "answer": str(row % 4 + 1)} for row in range(12)]
    task = make(write(tmp_path / "data.jsonl", rows), heldout_rows=2)  # whose questions are 2 + 1 and 3 + 1
    [note] = task.notes()
    assert note.startswith("task: 4 of 10 training rows of ")
    stream = ProblemStream(make(write(tmp_path / "all.jsonl", rows)), seed=0, heldout=task.withheld(2))
    assert {problem.answer for problem in stream.take(12)} == {"1", "2"}
    [user, calls, tool] = conversation(2, 0)
    others = [[{**user, "name": "Ann"}, calls, tool], [user, {**calls, "tool_calls": []}, tool], [user, calls]]
    assert len({Problem(tuple(messages), "").key for messages in [conversation(2, 0), *others]}) == 4


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_calls_of_tools_are_kept(tmp_path: Path, suffix: str) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Weather?", "name": "Ann", "tool_calls": []},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "14 C", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    path = write(tmp_path / f"data{suffix}", [{"prompt": messages, "answer": "14", "tools": tools}])
    problem = make(path).problem(0, seed=0)
    del messages[0]["tool_calls"]  # with which Llama 3.1's template shows a call in the place of the content
    assert problem.prompt == (messages[0], {**messages[1], "content": ""}, messages[2])
    assert problem.tools == tuple(tools)
    assert make(path, tools_column="none").problem(0, seed=0).key != problem.key
    with pytest.raises(ValueError, match=r"column 'answer' \(tools_column\) holds '14', and tools are a list of JSON"):
        make(path, tools_column="answer")


def test_a_held_out_file(tmp_path: Path) -> None:
    more = [{"prompt": "What is 50 + 1?", "answer": "51"}, ROWS[3], ROWS[3]]
    task = make(write(tmp_path / "data.jsonl", ROWS), heldout_path=str(write(tmp_path / "more.parquet", more)))
    heldout = task.heldout(2)
    assert [problem.prompt for problem in heldout] == ["What is 50 + 1?", "What is 3 + 1?"]
    stream = ProblemStream(task, seed=0, heldout=heldout)
    trained = stream.take(19)
    assert stream.position == 19  # of 19: the row that both files have is left out
    assert ROWS[3]["prompt"] not in [problem.prompt for problem in trained]


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n\n  \n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:4: no column 'answer' \(answer_column\): Known: prompt"):
        make(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "", "answer": "1"}, "column 'prompt' holds '', and a prompt is text or a list of messages"),
        ({"prompt": None, "answer": "1"}, "column 'prompt' holds None"),
        (
            {"prompt": "a", "answer": None},
            "column 'answer' holds None, and an answer is text, a number, or a list of these",
        ),
        ({"prompt": "a", "answer": "one"}, "verifier last_number: the answer 'one' holds no number"),
    ],
)
def test_bad_rows_are_errors(tmp_path: Path, suffix: str, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / f"data{suffix}", [{"prompt": "a", "answer": "1"}, row])
    with pytest.raises(ValueError, match=rf"data\{suffix}:2: {message}"):
        make(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_columns_are_errors(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", [{"promt": "a", "answer": "1"}])
    with pytest.raises(ValueError, match=r":1: no column 'prompt' \(prompt_column\): did you mean 'promt'\?"):
        make(path)
    with pytest.raises(ValueError, match=r":1: no column 'result' \(answer_column\): Known: answer, promt"):
        make(path, prompt_column="promt", answer_column="result")


@pytest.mark.parametrize(
    ("prompt", "system", "message"),
    [
        ([], None, r"column 'prompt' holds \[\]"),
        (["hi"], None, r"column 'prompt' holds 'hi', and a message is"),
        (
            [{"role": "user"}],
            None,
            r"column 'prompt' holds \{'role': 'user'\}, and a message is \{\"role\": \"user\"",
        ),
        ([{"role": "user", "content": 5}], None, r"column 'prompt' holds"),
        (7, None, r"column 'prompt' holds 7"),
        ([{"role": "system", "content": "s"}], "t", r"begins with a system message, and task\.system is set too"),
    ],
)
def test_bad_prompts_are_errors(tmp_path: Path, prompt: Any, system: str | None, message: str) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": prompt, "answer": "1"}])
    with pytest.raises(ValueError, match=rf"data\.jsonl:1: .*{message}"):
        make(path, system=system)


def test_a_boolean_is_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "answer": True}])
    with pytest.raises(ValueError, match=r"column 'answer' holds True"):
        make(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "answer": "1"}\n{"prompt": ', r"data\.jsonl:2: not JSON: "),
        ("[1, 2]\n", r"data\.jsonl:1: a row is one JSON object, got \[1, 2\]"),
        ("", r"data\.jsonl: the file has no rows"),
        ("\n\n", r"data\.jsonl: the file has no rows"),
    ],
)
def test_bad_files_are_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        make(path)


def test_a_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:2: not JSON: 'utf-8' codec can't decode"):
        make(path)


def test_files_of_other_kinds_are_errors(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"data\.txt: files end in \.jsonl, \.json, \.csv, \.parquet, \.arrow, each also with \.gz or \.zst",
    ):
        make(write(tmp_path / "data.txt", ROWS))
    with pytest.raises(ValueError, match=r"data\.jsonl: no such file \(relative paths start at /"):
        make(tmp_path / "data.jsonl")
    (tmp_path / "data.parquet").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.parquet: not a Parquet file: "):
        make(tmp_path / "data.parquet")


def test_a_missing_pyarrow_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"such files need the package pyarrow: pip install 'tbrm\[parquet\]'"):
        make(path)


def test_held_out_settings_that_cannot_be_met_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(ValueError, match="heldout_path and heldout_rows are both set: choose one"):
        make(path, heldout_path=str(path), heldout_rows=2)
    with pytest.raises(ValueError, match=r"heldout_rows is 20 and .* has 20 rows: none left to train on"):
        make(path, heldout_rows=20)
    with pytest.raises(ValueError, match="evaluation wants 6 distinct held-out prompts, and heldout_rows 5 gives 5"):
        make(path, heldout_rows=5).heldout(6)
    with pytest.raises(ValueError, match="and heldout_rows 0 gives 0"):
        make(path).heldout(1)
    with pytest.raises(ValueError, match=r"and heldout_path .*same\.jsonl gives 1"):
        make(path, heldout_path=str(write(tmp_path / "same.jsonl", [ROWS[0], ROWS[0]]))).heldout(2)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        make(path, heldout_rows=-1)


def test_the_verifier_is_checked_before_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no verifier is called 'last_numbr': did you mean 'last_number'"):
        make(tmp_path / "no_such.jsonl", verifier="last_numbr")
    with pytest.raises(ValueError, match=r"verifier\n.*Field required"):
        FileTask(name="file", path="no_such.jsonl")  # type: ignore[call-arg]


def test_verifier_options_reach_the_verifier(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "Capital of France?", "answer": "Paris"}])
    task = make(path, verifier="exact", verifier_options={"answer": "boxed"})
    problem = task.problem(0, seed=0)
    assert task.grade([problem] * 2, [r"\boxed{Paris}", "Paris"]) == [Grade(1.0, True), Grade(0.0, False)]


def by_length(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [len(completion) / 4 or None for completion in completions]


def test_what_counts_as_correct_is_said_by_the_task(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "1", "answer": "1"}\n')
    responses = ["a", "ab", "abc", "abcd", ""]
    for settings, correct in (
        ({}, [False, False, False, True, False]),
        ({"correct_at": 0.5}, [False, True, True, True, False]),
        ({"correct_at": -1}, [True, True, True, True, False]),  # what could not be graded never is
    ):
        task = FileTask(name="file", path=str(path), verifier=f"{__name__}:by_length", **settings)
        grades = task.grade([task.problem(0, 0)] * 5, responses)
        assert [grade.correct for grade in grades] == correct
        assert [grade.reward for grade in grades[:4]] == [0.25, 0.5, 0.75, 1.0]


class Lenient(Verifier):
    """Small rewards, and its own word on what is correct."""

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return [Grade(0.3, correct=response == "a") for response in responses]


def test_a_verifiers_word_on_what_is_correct_counts_unless_the_task_says_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "problems.jsonl", [{"prompt": "1", "answer": "1"}])
    for settings, correct in (
        ({}, [True, False]),
        ({"correct_at": 0.2}, [True, True]),
        ({"correct_at": 0.5}, [False] * 2),
    ):
        task = make(path, verifier=f"{__name__}:Lenient", **settings)
        assert [grade.correct for grade in task.grade([task.problem(0, 0)] * 2, ["a", "b"])] == correct
