"""Runs side by side: which are a group, what differs, what each came to, and the problems that all were asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tbrm.commands.cli import main
from tbrm.reporting.comparison import answers, differences, gaps, reached, read_groups, title
from tbrm.reporting.comparison_page import write_comparison
from tbrm.reporting.metrics import MetricsLog
from tbrm.reporting.plots import plots
from tests.tbrm.reporting.made_run import ATTACK, CONFIG, make_run, metrics_of, sample, write_samples
from tests.tbrm.reporting.parsed_page import Page

REVAL = {"name": "reval", "beta": 0.002, "centre_rewards": False}


def seeds(folder: Path, name: str, accuracies: dict[int, float], **config: Any) -> list[Path]:
    """A run of each seed, and what it came to."""
    return [
        make_run(folder / f"{name}{seed}", after=after, seed=seed, run={"dir": f"runs/{name}{seed}"}, **config)
        for seed, after in accuracies.items()
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds of one recipe, and another objective's run, which nobody right at first is with."""
    folder = tmp_path_factory.mktemp("runs")
    other = make_run(folder / "<img src=x onerror=alert(1)>", objective=REVAL)
    write_samples(other, 4, [sample(i, correct=i == 0, response=ATTACK) for i in range(20)])
    return [*seeds(folder, "tbrm-seed", {0: 0.5, 1: 0.6, 10: 0.7}), other]


@pytest.fixture(scope="module")
def page(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_comparison(read_groups(folders), tmp_path_factory.mktemp("page") / "compare.html"))


def test_runs_that_differ_in_nothing_but_their_seed_are_a_group(folders: list[Path]) -> None:
    groups = read_groups([*folders, folders[0]])
    assert [title(group) for group in groups] == ["tbrm (3 seeds)", "<img src=x onerror=alert(1)>"]
    assert list(groups[0].runs) == ["tbrm-seed0", "tbrm-seed1", "tbrm-seed10"]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["demo-s0", "demo-s1"], "demo"),
        (["sums/seed0", "sums/seed1"], "sums"),
        (["demo1", "demo2"], "demo"),
        (["alpha", "amber"], "alpha"),
        (["0", "1"], "0"),
    ],
)
def test_a_group_is_called_what_its_runs_begin_with(tmp_path: Path, names: list[str], label: str) -> None:
    # A third run has the same last name as the first where the first has a folder, so that both names have theirs.
    beside = make_run(tmp_path / "beside" / Path(names[0]).name, objective=REVAL)
    runs = [make_run(tmp_path / name, steps=1, seed=seed) for seed, name in enumerate(names)]
    group = read_groups([*runs, *([beside] if "/" in names[0] else [])])[0]
    assert (group.label, list(group.runs)) == (label, names)


def test_a_group_is_drawn_as_the_mean_of_its_seeds_and_a_band(folders: list[Path]) -> None:
    groups = read_groups(folders)
    curves = plots([list(group.runs.values()) for group in groups], ["a", "b"])["figures"]["accuracy"]["curves"]
    assert curves[0] == {"group": 0, "x": 0, "y": [0.2, 0.6], "low": [0.2, 0.5], "high": [0.2, 0.7]}
    assert curves[1] == {"group": 1, "x": 0, "y": [0.2, 0.55], "low": [0.081, 0.342], "high": [0.416, 0.742]}


def test_seeds_that_came_less_far_are_drawn_as_far_as_all_came(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a{seed}", steps, seed=seed) for seed, steps in enumerate((4, 2))]
    groups = read_groups(runs)
    drawn = plots([list(group.runs.values()) for group in groups], ["a"])
    assert drawn["x"][drawn["figures"]["loss"]["curves"][0]["x"]]["step"] == [1, 2]
    assert drawn["x"][drawn["figures"]["accuracy"]["curves"][0]["x"]]["step"] == [0]
    assert gaps(groups) == ["a (2 seeds): its curves end after step 2, the last that all of its runs have."]
    assert reached(groups[0])["steps"] == "4, 2 of 4"


def test_what_differs_in_the_recipes_is_listed_and_nothing_else(folders: list[Path]) -> None:
    assert differences(read_groups(folders)) == {
        "seed": ["0, 1, 10", "3"],
        "objective.name": ["tbrm", "reval"],
        "objective.centre_rewards": ["–", "false"],
    }


def test_what_a_resume_changed_divides_runs_and_is_listed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    (runs[1] / "config-history.jsonl").write_text('{"step": 2, "changed": {"objective.beta": [0.1, 0.002]}}\n')
    assert differences(read_groups(runs)) == {
        "seed": ["0", "1"],
        "changed by a resume": ["nothing", "objective.beta after step 2"],
    }


def test_a_run_whose_config_is_lost_is_a_group_of_its_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "abc"]
    for run in runs[1:]:
        (run / "config.yaml").unlink()
    groups = read_groups(runs)
    assert [title(group) for group in groups] == ["a", "b", "c"]
    assert differences(groups) == {}, "nothing is known to differ"


def test_what_each_came_to_and_what_it_cost(folders: list[Path]) -> None:
    several, one = map(reached, read_groups(folders))
    assert several == {
        "accuracy": "20.0% -> 60.0%",
        "interval": "50.0–70.0%",
        "reward": "0.3125 -> 0.75",
        "steps": "4",
        "responses": "80",
        "tokens": "10,000",
        "training": "6 min 40 s",
        "memory": "2,004 MiB",
    }
    assert (one["accuracy"], one["interval"]) == ("20.0% -> 55.0%", "34.2–74.2%")


def test_problems_are_ordered_by_whom_they_divide(folders: list[Path]) -> None:
    """The seeds have 1 to 11 right, the other run 0."""
    found = answers(read_groups(folders))
    assert {who: len(problems) for who, problems in found.items()} == {
        "only tbrm right": 11,
        "only <img src=x onerror=alert(1)> right": 1,
        "all wrong": 8,
    }
    first = found["only tbrm right"][0]
    assert (first.prompt, first.answer) == ("Prompt number 1", "answer 1")
    assert [each and each["correct"] for each in first.responses] == [True, False]


def test_only_problems_that_all_were_asked_are_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, objective={"name": name}) for name in ("a", "b", "c")]
    write_samples(runs[1], 4, [sample(i, correct=True) for i in (3, 30)])
    for path in (runs[2] / "samples").iterdir():
        path.unlink()
    groups = read_groups(runs)
    [problems] = answers(groups).values()
    assert [each.prompt for each in problems] == ["Prompt number 3"]
    assert problems[0].responses[2] is None
    page = Page(write_comparison(groups, tmp_path / "page.html"))
    assert "c no responses" in page.text and "1 all right" in page.text
    for step in (0, 4):
        write_samples(runs[1], step, [sample(30, correct=True)])
    page = Page(write_comparison(read_groups(runs), tmp_path / "page.html"))
    assert "There is none that the runs with responses were all asked" in page.text


def test_the_page_has_it_all_and_keeps_what_others_wrote_as_text(page: Page) -> None:
    assert "tbrm compare: 4 runs of 2 recipes" in page.text
    assert "tbrm (3 seeds) 20.0% → 60.0% 50.0–70.0% 0.3125 → 0.75" in page.text
    assert "objective.name tbrm reval" in page.text
    assert "Only tbrm right · 6 of 11" in page.text
    assert "tbrm-seed0, step 4 · ✓ right · reward 1" in page.text
    assert page.text.count(ATTACK) >= 20 and page.text.count("All settings of") == 4
    assert not {"img", "iframe", "link"} & {tag for tag, _ in page.elements}
    assert [group["label"] for group in page.plots["groups"]] == ["tbrm (3 seeds)", "<img src=x onerror=alert(1)>"]
    assert "<" not in page.scripts[0] and len(page.scripts) == 2
    seconds = page.plots["figures"]["seconds"]
    assert not seconds["stacked"] and [curve["y"] for curve in seconds["curves"]] == [[100] * 4] * 2


def test_runs_of_anybody_in_any_state_are_compared(tmp_path: Path) -> None:
    """One still goes, one of another version has other keys, and of one everything is broken but a few lines."""
    whole = make_run(tmp_path / "whole")
    going = tmp_path / "going"
    with MetricsLog(going) as log:
        log.log(1, metrics_of(1))
    (going / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"objective": REVAL}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("model: {name: [x, 1]}\nnew: {section: {deep: 2020-01-01}}\n3: {}\n")
    (other / "eval.jsonl").write_text(
        '{"step": 0, "accuracy": 0.5}\n{"step": 7, "accuracy": 1, "ci_low": "?", "n": "<b>"}\n'
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    lines = [
        "nonsense",
        "[]",
        '{"step": "1"}',
        '{"loss": 1}',
        json.dumps({"step": 2, "loss": 1.5}),
        "[" * 100_000,
        "{}",
    ]
    lines += [f'{{"step": {10**400}}}', '{"step": 3, "loss": NaN, "seconds/x": null}', '{"step": 2, "loss": 2.5}', ""]
    (broken / "metrics.jsonl").write_text("\n".join(lines))
    (broken / "config.yaml").write_text("a: &a [1]\nb: *a\n")
    (broken / "result.json").write_text('["no result"]')
    write_samples(broken, 0, [{"prompt": 1}, sample(0, correct=True)])
    groups = read_groups([whole, going, other, broken])
    drawn = plots([list(group.runs.values()) for group in groups], ["a"] * 4)["figures"]
    assert [curve["group"] for curve in drawn["accuracy"]["curves"]] == [0, 2]
    assert [curve["y"] for curve in drawn["loss"]["curves"] if curve["group"] == 3] == [[2.5, None]]
    text = Page(write_comparison(groups, tmp_path / "page.html")).text
    for line in (
        "going: eval.jsonl is empty",
        "broken: metrics.jsonl, line 1 is not JSON",
        "line 2 is a list, no row; line 3 has no step, and 4 more like them: left out",
        "broken: config.yaml cannot be read: it has an alias",
        "broken: result.json cannot be read: it holds a list",
        "broken: samples/step-000000.jsonl, line 1 has no prompt, response",
    ):
        assert line in text
    assert "other 50.0% → 100.0% – – → – 0 – – – –" in text
    assert "new.section.deep – – " in text


def test_a_run_alone_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["compare", str(run), f"{run}/."]) == 1
    assert capsys.readouterr().err == (
        f"tbrm compare: {run} is one run: give two or more, or see it alone with `tbrm report {run}`\n"
    )
    assert main(["compare", str(run), str(tmp_path)]) == 1
    assert f"tbrm compare: {tmp_path} holds nothing of a run" in capsys.readouterr().err


def test_the_command_tells_it_in_the_terminal_and_needs_no_torch(folders: list[Path], tmp_path: Path) -> None:
    code = (
        "import sys; from tbrm.commands.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys(); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "compare", *map(str, folders), "--out", "new/page.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[1] == "tbrm (3 seeds) ▄█ 20.0% -> 60.0% 50.0–70.0% 0.3125 -> 0.75 4 80 10,000 6 min 40 s 2,004 MiB"
    assert "differs tbrm (3 seeds) <img src=x onerror=alert(1)>" in lines
    assert "objective.name tbrm reval" in lines
    assert any(line.startswith("of the same held-out problems: 11 only tbrm right; 1 only") for line in lines)
    assert lines[-1] == "page new/page.html" and (tmp_path / "new/page.html").exists()
