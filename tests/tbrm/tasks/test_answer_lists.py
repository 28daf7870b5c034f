"""Rows with several right answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tbrm.tasks.file import FileTask
from tests.tbrm.tasks.test_file import write


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_list_of_answers_are_each_right(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", [{"prompt": "a", "answer": ["1", "2"]}, {"prompt": "b", "answer": ["3"]}])
    task = FileTask(name="file", path=str(path), verifier="last_number")
    problem = next(each for each in (task.problem(i, 0) for i in range(2)) if each.prompt == "a")
    assert problem.answers == ("1", "2")
    assert [grade.correct for grade in task.grade([problem] * 3, ["1", "2", "3"])] == [True, True, False]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], r"column 'answer' holds \[\], and an answer is text, a number, or a list of these"),
        ([1, True], r"column 'answer' holds \[1, True\], and an answer is text"),
        (["1", "one"], "verifier last_number: the answer 'one' holds no number"),
    ],
)
def test_a_list_with_what_is_no_answer_is_an_error(tmp_path: Path, answer: list[Any], message: str) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": answer}])
    with pytest.raises(ValueError, match=rf"data.jsonl:2: {message}"):
        FileTask(name="file", path=str(path), verifier="last_number")
