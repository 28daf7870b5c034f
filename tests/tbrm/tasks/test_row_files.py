"""Data as people have it: formats, compression, several files, columns within columns, prompts and answers made of columns."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tbrm.tasks.file import FileTask
from tbrm.tasks.row_files import find_files, read_rows

ROWS = [{"prompt": f"{n} + 1, «{n}»?\nsay", "answer": str(n + 1)} for n in range(5)]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows, as the file's name says."""
    table = pyarrow.Table.from_pylist(rows)
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    if plain.suffix == ".jsonl":
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    elif plain.suffix == ".csv":
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(table, plain)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    if path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as out:
            out.write(plain.read_bytes())
    return path


def saved_dataset(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As `datasets` 4 lays it out on disk: streams of Arrow beside state.json. The package itself is not installed here."""
    path.mkdir(parents=True)
    (path / "state.json").write_text("{}")
    for number, part in enumerate((rows[:2], rows[2:])):
        table = pyarrow.Table.from_pylist(part)
        with pyarrow.ipc.new_stream(str(path / f"data-{number:05d}-of-00002.arrow"), table.schema) as out:
            out.write_table(table)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_reads_alike_packed_or_not(tmp_path: Path, suffix: str, packed: str) -> None:
    path = written(tmp_path / f"data{suffix}{packed}", ROWS)
    places, rows = zip(*read_rows(str(path)), strict=True)
    assert list(rows) == ROWS
    assert places[0].startswith(f"{path}:")
    task = FileTask(name="file", path=str(path), verifier="last_number")
    assert task.problem(0, 0).prompt in [row["prompt"] for row in ROWS]


def test_a_saved_data_set_is_a_folder(tmp_path: Path) -> None:
    saved_dataset(tmp_path / "all" / "train", ROWS)
    assert [row for _, row in read_rows(str(tmp_path / "all" / "train"))] == ROWS
    with pytest.raises(ValueError, match=r"all: a data set of the splits train: name one, .*all/train"):
        list(read_rows(str(tmp_path / "all")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: a folder without \*\.arrow"):
        list(read_rows(str(tmp_path / "empty")))
    task = FileTask(name="file", path=str(tmp_path / "all" / "train"), verifier="last_number")
    assert list(task.files()) == ["path/data-00000-of-00002.arrow", "path/data-00001-of-00002.arrow"]


def test_several_files_and_patterns_are_read_in_order(tmp_path: Path) -> None:
    for name, rows in {"b-2.jsonl": ROWS[3:], "b-1.jsonl": ROWS[1:3], "a.csv": ROWS[:1]}.items():
        written(tmp_path / name, rows)
    paths = [str(tmp_path / "a.csv"), str(tmp_path / "b-*.jsonl")]
    assert [row for _, row in read_rows(paths)] == ROWS
    assert [path.name for path in find_files(paths)] == ["a.csv", "b-1.jsonl", "b-2.jsonl"]
    task = FileTask(name="file", path=paths, heldout_path=str(tmp_path / "a.csv"), verifier="last_number")
    assert list(task.files()) == ["path/a.csv", "path/b-1.jsonl", "path/b-2.jsonl", "heldout_path"]
    with pytest.raises(ValueError, match=r"c-\*\.jsonl: no file matches"):
        find_files(str(tmp_path / "c-*.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"prompt": "a", "answer": "1"}\n{"prompt": "\\ud83d", "answer": "1"}\n',
            r":2: half of a surrogate pair",
        ),
        ("a.json", b'[{"prompt": "a\\uDE00", "answer": "1"}]', r":1: half of a surrogate pair"),
        (
            "a.json",
            b'{"prompt": "a", "answer": "1"}',
            r"a \.json file is an array of rows, got .*; one object a line is \.jsonl",
        ),
        ("a.json", b"[1]", r":1: a row is one JSON object, got 1"),
        ("a.csv", b"prompt,answer\na,1\nb\n", r":3: not CSV: 1 fields, and the header has 2"),
        ("a.csv", b"prompt,answer\na,1,2\n", r":2: not CSV: 3 fields, and the header has 2"),
        ("a.csv", b'prompt,answer\n"a,1\n', r"not CSV: unexpected end of data"),
        ("a.csv", b"prompt,answer\n\xff,1\n", r"not CSV: 'utf-8' codec can't decode"),
        ("a.csv", b"prompt,answer\n", r"the file has no rows"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "a", "answer": "1"}\n' * 9, mtime=0)[:-9],
            r"cannot be read after row \d+: Compressed",
        ),
        ("a.jsonl.gz", b"no gzip", r"cannot be read after row 0: Not a gzipped file"),
        ("a.jsonl.zst", b"no zstd at all", r"cannot be read after row 0: "),
        ("a.txt.gz", b"", r"files end in \.jsonl"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        FileTask(name="file", path=str(tmp_path / name), verifier="last_number")


def test_a_surrogate_pair_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\\ud83d\\ude00", "answer": "1"}\n')
    assert FileTask(name="file", path=str(tmp_path / "a.jsonl"), verifier="exact").problem(0, 0).prompt == "😀"


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "ability": "math",
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "extra_info": {"answer": "2 + 2 = 4\n#### 4", "index": 0, "split": "train"},
}


def test_verls_parquet_reads_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "verl.parquet", [VERL])
    task = FileTask(name="file", path=str(path), answer_column="reward_model.ground_truth", verifier="last_number")
    problem = task.problem(0, 0)
    assert (problem.messages, problem.answer) == (({"role": "user", "content": "2 + 2?"},), "4")
    assert problem.entry["extra_info"]["split"] == "train"
    other = FileTask(
        name="file", path=str(path), answer_column="extra_info.answer", answer_from="hashes", verifier="exact"
    )
    assert other.problem(0, 0).answer == "4"
    with pytest.raises(
        ValueError, match=r":1: no column 'reward_model\.ground_trut' \(answer_column\): did you mean 'ground_truth'\?"
    ):
        FileTask(name="file", path=str(path), answer_column="reward_model.ground_trut", verifier="exact")


def test_a_column_whose_name_has_a_dot_comes_before_what_lies_within(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"prompt": "?", "a.b": "1", "a": {"b": "2", "c.d": "3"}}])
    for column, answer in {"a.b": "1", "a.c.d": "3"}.items():
        assert (
            FileTask(name="file", path=str(path), answer_column=column, verifier="exact").problem(0, 0).answer == answer
        )


def test_prompts_are_made_of_columns_and_answers_taken_out_of_solutions(tmp_path: Path) -> None:
    row = {"problem": "{x}?", "meta": {"level": 3}, "options": ["A) 1", "B) 2"], "solution": r"So \boxed{\frac{1}{2}}."}
    path = written(tmp_path / "math.jsonl", [row])
    given = {"name": "file", "path": str(path), "verifier": "math_verify", "answer_column": "solution"}
    task = FileTask(
        **given, answer_from="boxed", prompt_template="Level {meta.level}: {problem}\n{options}\nBox { it }."
    )
    problem = task.problem(0, 0)
    assert problem.prompt == "Level 3: {x}?\nA) 1\nB) 2\nBox { it }."
    assert problem.answer == r"\frac{1}{2}"
    with pytest.raises(ValueError, match=r":1: no column 'problm' \(prompt_template\): did you mean 'problem'\?"):
        FileTask(**given, prompt_template="{problm}")
    with pytest.raises(
        ValueError, match=r':1: column \'solution\' holds .*, without "#### answer" \(answer_from: hashes\)'
    ):
        FileTask(**given, answer_from="hashes", prompt_template="{problem}")
