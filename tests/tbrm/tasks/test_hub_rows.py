"""Data sets of a hub, of which there is none here: `datasets` reads a folder on disk by the same call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tbrm.tasks.file import FileTask
from tbrm.tasks.hub_rows import hub_files
from tbrm.tasks.row_files import read_rows

datasets = pytest.importorskip("datasets", reason="datasets is not installed")

CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]
- config_name: other
  data_files: [{split: train, path: test.jsonl}]
---
"""


@pytest.fixture(autouse=True)
def no_network_and_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub_files.cache_clear()


@pytest.fixture
def gsm(tmp_path: Path) -> Path:
    folder = tmp_path / "gsm"
    folder.mkdir()
    for split, numbers in {"train": range(5), "test": range(5, 8)}.items():
        rows = [{"question": f"{n} + 1?", "answer": f"So it is\n#### {n + 1}"} for n in numbers]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(CARD)
    return folder


def test_a_split_of_a_configuration_is_a_file_as_others_are(gsm: Path) -> None:
    task = FileTask(
        name="file",
        path=f"hub:{gsm}:main:train",
        heldout_path=f"hub:{gsm}:main:test",
        prompt_column="question",
        answer_from="hashes",
        verifier="last_number",
    )
    assert [problem.answer for problem in task.heldout(3)] == ["6", "7", "8"]
    assert {task.problem(index, 0).prompt for index in range(5)} == {f"{n} + 1?" for n in range(5)}
    assert all(Path(file).suffix == ".arrow" for file in task.files().values())
    [(_, row), *others] = read_rows(f"hub:{gsm}:other")
    assert (row["question"], len(others)) == ("5 + 1?", 2)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("", "Config name is missing"),
        (":third", "BuilderConfig 'third' not found"),
        (":main:validation", 'Unknown split "validation"'),
        (":main:train:more", "wants hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT"),
    ],
)
def test_what_is_not_there_is_named(gsm: Path, rest: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        hub_files(f"hub:{gsm}{rest}")
    assert str(raised.value).startswith(f"hub:{gsm}{rest}: ")


def test_a_hub_that_cannot_be_asked_is_named() -> None:
    with pytest.raises(ValueError, match="hub:nobody/nothing: "):
        hub_files("hub:nobody/nothing")


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"need the package datasets: pip install 'tbrm\[hub\]'"):
        hub_files("hub:openai/gsm8k")
