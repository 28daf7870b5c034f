"""The pages of docs/ for users: what they show runs as shown, in the order of the page, and what they list is all there is."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tbrm.commands.cli import main
from tbrm.config.recipe import describe
from tbrm.objectives import OBJECTIVES
from tbrm.registry import GIVEN
from tbrm.reporting.metrics import read_jsonl
from tbrm.tasks import TASKS
from tbrm.tasks.file import FileTask
from tbrm.tasks.verifiers import VERIFIERS
from tests.tbrm.conftest import RECIPES, tiny_config
from tests.tbrm.training.runs import AHEAD

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a reader is who has a clone and has run nothing yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("recipes").symlink_to(RECIPES)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("my_"):
            del sys.modules[name]


def do_as_shown(page: str) -> None:
    """Writes the blocks that begin with a file's name, runs the others of Python, and every command of `tbrm`."""
    blocks = re.findall(r"^```(python|yaml|sh)\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, block in blocks:
        if file := re.match(r"# ([a-z_]+\.(?:py|yaml))\n", block):
            Path(file[1]).write_text(block)
        elif language == "python":
            exec(block, names)
        else:
            assert language == "sh", block
            for line in block.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "tbrm"
                assert main(arguments) == 0, line


def steps_of(runs: Path) -> dict[str, int]:
    return {run.name: len(read_jsonl(run / "metrics.jsonl")) for run in runs.iterdir()}


@pytest.mark.slow
def test_the_page_of_tasks(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    do_as_shown("tasks.md")
    assert steps_of(folder / "runs") == {
        "own_data": 20,
        "rows": 2,
        "exact": 2,
        "sum": 2,
        "closeness": 2,
        "gcd": 1,
        "reverse": 1,
    }
    shaped, summed = (read_jsonl(folder / f"runs/{name}/metrics.jsonl") for name in ("closeness", "sum"))
    assert any(row["reward_mean"] > 2 * row["correct_share"] for row in shaped)  # some are neither right nor wrong
    assert all(-1 <= row["reward/length"] < 0 for row in summed)
    # The file's last rows, and how many evaluations take of them where nobody says it.
    evals = {name: read_jsonl(folder / f"runs/{name}/eval.jsonl")[0]["n"] for name in ("own_data", "rows", "gcd")}
    assert evals == {"own_data": 16, "rows": 8, "gcd": 20}
    assert len(read_jsonl(RECIPES / "own_data.jsonl")) > 50


@pytest.mark.slow
def test_the_page_of_objectives(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    do_as_shown("objectives.md")
    assert steps_of(folder / "runs") == {"huber": 1, "baseline": 1, "ppo": 1}


@pytest.mark.slow
def test_the_page_of_the_log_and_every_figure_that_a_run_writes(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    do_as_shown("reading.md")
    assert (
        main(["train", "recipes/tiny.yaml", "run.dir=runs/short", "trainer.steps=1", "rollout.max_prompt_tokens=9"])
        == 0
    )
    from tbrm.training.trainer import Trainer

    Trainer(tiny_config(folder / "runs" / "ahead", **AHEAD)).train()
    page = (DOCS / "reading.md").read_text()
    documented = set(re.findall(r"`([a-z_/]+)`", page))
    for kind in ("metrics", "eval"):
        written = {key for path in folder.glob(f"runs/*/{kind}.jsonl") for row in read_jsonl(path) for key in row}
        assert {key for key in written if not key.startswith("reward/")} - {"step"} <= documented
        assert len(written) > 8
    assert (folder / "runs" / "tiny" / "report.html").exists()


def test_the_pages_name_every_task_verifier_and_objective_and_their_keys() -> None:
    tasks, objectives = (DOCS / "tasks.md").read_text(), (DOCS / "objectives.md").read_text()
    for name in {*TASKS.builtin, *VERIFIERS.builtin} - {GIVEN}:
        assert f"| `{name}` |" in tasks
    for key, _, _ in describe(FileTask):
        assert key == "name" or f"task.{key}" in tasks or f"  {key}: " in tasks, key
    for name in set(OBJECTIVES.builtin) - {GIVEN}:
        assert f"| `{name}` |" in objectives
        for key, _, _ in describe(OBJECTIVES(name)):
            assert f"`objective.{key}`" in objectives, key


@pytest.mark.parametrize("page", ["tasks.md", "objectives.md", "reading.md"])
def test_links_of_the_pages_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([\w./-]*)(?:#([\w-]+))?\)", (DOCS / page).read_text()):
        file = DOCS / target if target else DOCS / page
        assert file.exists(), target
        heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
        assert not anchor or anchor in slugs, (target, anchor)
