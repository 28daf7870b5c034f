"""The report of a run: what it says, for whole, running and killed runs; it fetches nothing, and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tbrm import reporting
from tbrm.reporting.facts import choose
from tbrm.reporting.metrics import MetricsLog
from tbrm.reporting.page import write_report
from tbrm.reporting.plots import COLOURS, PANELS, plots, series, spent
from tbrm.reporting.run_folder import Run
from tests.tbrm.reporting.made_run import ATTACK, CONFIG, make_run, metrics_of, sample, write_samples
from tests.tbrm.reporting.parsed_page import Page


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return Page(write_report(run_dir))


def test_what_a_resume_changed_is_among_the_facts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [
        {"step": 1, "changed": {"seed": [0, 3], "objective.beta": [0.1, 0.002]}},
        {"step": 3, "changed": {"trainer.steps": [3, 4]}},
    ]
    (run / "config-history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run).read_text()
    assert "seed, objective.beta after step 1; trainer.steps after step 3" in page


def test_the_page_says_what_was_reached_and_how(page: Page) -> None:
    assert "20.0% → 55.0% accuracy on 20 held-out prompts, before training and after it" in page.text
    assert "95% intervals 8.1–41.6% and 34.2–74.2%" in page.text
    for fact in ("Model models/small", "Task chain_sum", "Objective tbrm", "Beta 0.002", "Steps 4", "Seed 3",
                 "Training time 8 min 13 s", "Throughput 250 tokens/s", "Peak memory 2,004 MiB",
                 "Ungraded 8 responses"):  # fmt: skip
        assert fact in page.text
    assert "not complete" not in page.text


def test_the_page_has_every_curve(page: Page) -> None:
    panels = [f"{panel.title} {panel.unit}" for panel in PANELS]
    titles = [
        "Accuracy on held-out prompts",
        "Reward on held-out prompts",
        *panels,
        "Seconds per step by phase rollout update",
    ]
    places = [page.text.find(title) for title in titles]
    assert -1 not in places and places == sorted(places)
    drawn = [attributes["data-figure"] for tag, attributes in page.elements if "data-figure" in attributes]
    assert drawn == list(page.plots["figures"]) and len(drawn) == len(titles)
    assert "mean over trajectories, log scale" in page.text
    accuracy = page.plots["figures"]["accuracy"]["curves"]
    assert accuracy == [{"group": 0, "x": 0, "y": [0.2, 0.55], "low": [0.081, 0.342], "high": [0.416, 0.742]}]
    residual = page.plots["figures"]["residual_mean"]["curves"][0]
    assert (residual["y"], residual["low"], residual["high"]) == ([19, 18, 17, 16], [14, 13, 12, 11], [24, 23, 22, 21])


def test_curves_can_be_seen_against_what_was_spent(page: Page) -> None:
    evals, steps = page.plots["x"]
    assert evals == {"step": [0, 4], "responses": [0, 80], "tokens": [0, 10_000], "seconds": [0, 400]}
    assert steps["responses"] == [20, 40, 60, 80] and steps["tokens"] == [1000, 3000, 6000, 10_000]
    assert [attributes["data-axis"] for tag, attributes in page.elements if "data-axis" in attributes] == list(evals)


def test_responses_of_an_earlier_version_are_those_that_are_fresh_or_were_dropped() -> None:
    rows = [{"step": step, "trajectories": 16, "fresh_share": 0.75, "dropped": 4} for step in (1, 2)]
    found = spent(rows, np.array([0.0, 1.0, 2.0, 3.0]))
    assert found["responses"].tolist()[:3] == [0, 16, 32] and math.isnan(found["responses"][3])
    assert np.isnan(found["tokens"]).all(), "not recorded, which is not none"


def test_the_page_shows_a_dozen_prompts_of_every_outcome(page: Page) -> None:
    assert "8 fixed, 3 stayed right, 8 still wrong, 1 broke" in page.text
    shown = [int(number) for number in re.findall(r"Prompt number (\d+)", page.text)]
    assert len(shown) == len(set(shown)) == 12
    assert 0 in shown, "the one that broke"
    assert "answer answer 4 step 0 · ✗ wrong · reward 0 So it is 7. step 4 · ✓ right · reward 1" in page.text
    assert "step 0 · ✗ wrong, cut off at the length limit" in page.text


def test_the_page_shows_the_config(page: Page) -> None:
    assert yaml.safe_dump(CONFIG, sort_keys=False) in "".join(page.words)


def test_what_a_model_wrote_stays_text(page: Page) -> None:
    assert page.text.count(ATTACK) >= 12
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_no_script_runs_but_the_pages_own(page: Page) -> None:
    assert [attributes for tag, attributes in page.elements if tag == "script"] == [
        {"type": "application/json", "id": "plots"},  # which is no script
        {},
    ]
    own = Path(reporting.__file__).with_name("web")
    assert page.scripts[1].endswith((own / "plots.js").read_text())
    assert (own / "uplot/uPlot.iife.min.js").read_text() in page.scripts[1]
    assert (own / "uplot/LICENSE").read_text() in page.scripts[1], "its licence goes where it goes"
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"]


def test_the_page_fetches_nothing(page: Page) -> None:
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}:
                assert value is not None and value.startswith("#")
    assert "@import" not in page.source and "url(" not in page.source


def test_what_a_run_calls_its_metrics_does_not_leave_the_plots(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, metrics_of(1) | {f"reward/</script>{ATTACK}": 1.0, f"seconds/{ATTACK}": 2.0})
    page = Page(write_report(tmp_path))
    assert len(page.scripts) == 2 and "img" not in {tag for tag, _ in page.elements}
    assert page.plots["figures"][f"reward/</script>{ATTACK}"]["title"] == f"Reward of </script>{ATTACK}"
    assert "<" not in page.scripts[0]


def test_every_colour_is_defined_light_and_dark(page: Page) -> None:
    used = {f"--{name}" for name in COLOURS} | set(re.findall(r"var\((--\w+)\)", page.source)) - {"--swatch"}
    assert used >= {"--ink", "--muted", "--grid", "--blue"}
    for name in used:
        assert page.source.count(f"{name}: #") == 2
    assert all(f".{name} {{ --swatch: var(--{name}); }}" in page.source for name in COLOURS)


def test_the_library_is_as_it_was_published() -> None:
    folder = Path(reporting.__file__).with_name("web") / "uplot"
    noted = (folder / "README.md").read_text()
    files = [path for path in folder.iterdir() if path.name != "README.md"]
    assert len(files) == 3
    for path in files:
        assert f"{path.name}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}`" in noted


def test_the_mean_reward_and_what_counts_as_correct_stand_beside_the_accuracy(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "task": {"name": "file", "correct_at": 0.8}}))
    page = Page(write_report(tmp_path))
    assert "Correct a reward of 0.8 or more" in page.text
    assert "before training and after it mean reward 0.3125 → 0.75 95% intervals" in page.text
    assert "Mean reward 0.3125 -> 0.75" in page.text
    assert "Reward on held-out prompts" in page.text


def test_the_same_run_gives_the_same_page(run_dir: Path, page: Page) -> None:
    assert write_report(run_dir).read_text(encoding="utf-8") == page.source


def test_a_killed_run_has_a_report_of_how_far_it_came(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "result.json").write_text('{"accuracy_bef')
    for name in ("metrics.jsonl", "eval.jsonl", "samples/step-000004.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-20])
    page = Page(write_report(tmp_path))
    assert "20.0% → – accuracy on 20 held-out prompts, before training and so far" in page.text
    assert "This report is not complete result.json cannot be read" in page.text
    assert "Steps 3 of 4" in page.text and "Training time 5 min 00 s" in page.text
    assert "1 wrong before" in page.text


def test_a_run_that_has_only_started_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with MetricsLog(tmp_path) as log:
        page = Page(write_report(tmp_path))
        assert "– → – accuracy on the held-out prompts" in page.text
        for gap in ("metrics.jsonl is empty", "eval.jsonl is empty", "samples are missing", "result.json is missing"):
            assert gap in page.text
        assert (
            page.plots["figures"] == {}
            and "data-axis" not in page.source[page.source.index("<main>") : page.source.index("<script")]
        )
        assert "Steps 0 of 4" in page.text

        log.log_eval(0, {"accuracy": 0.2})
        log.log(1, metrics_of(1, loss=math.nan))
        write_samples(tmp_path, 0, [sample(i, correct=i == 0) for i in range(3)])
        page = Page(write_report(tmp_path))
    assert "20.0% → –" in page.text and "1 right before, 2 wrong before" in page.text
    assert page.text.count("not asked again yet") == 3
    assert "Reward" in page.text and "Loss" not in page.text


def test_damaged_files_are_named(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "config.yaml").write_text("run: [")
    (tmp_path / "eval.jsonl").write_text("nonsense\n")
    (tmp_path / "metrics.jsonl").unlink()
    text = Page(write_report(tmp_path)).text
    assert "config.yaml cannot be read" in text
    assert "eval.jsonl, line 1 is not JSON" in text
    assert "metrics.jsonl is missing" in text
    assert "20.0% → 55.0%" in text, "from result.json"


def test_text_that_no_file_can_hold_does_not_stop_the_report(tmp_path: Path) -> None:
    write_samples(tmp_path, 0, [sample(0, correct=False, response="half a pair: \ud83d, nothing: \x00")])
    assert "half a pair: ?, nothing:" in Page(write_report(tmp_path)).text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds nothing of a run.*metrics.jsonl is missing"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def drawn(rows: list[dict[str, Any]]) -> dict[str, Any]:
    run = Run(Path("x"), {}, [], metrics=rows, evals=[], result={}, samples=[], sample_steps=[], gaps=[])
    figures: dict[str, Any] = plots([[run]], ["x"])["figures"]
    return figures


def test_long_runs_are_drawn_with_a_bounded_number_of_points() -> None:
    rows = [{"step": step, "reward_mean": float(step % 101)} for step in range(1, 20_004)]
    figure = drawn(rows)["reward_mean"]
    [curve] = figure["curves"]
    assert figure["unit"] == "mean over trajectories, 101 steps a point"
    assert len(curve["y"]) == 199 and curve["y"][0] == 50 and curve["low"][0] == 0 and curve["high"][0] == 100


def test_a_loss_that_is_not_positive_is_drawn_on_a_linear_scale() -> None:
    assert list(drawn([{"step": 1, "reward_mean": 1.2, "reward/exact": 1.0}])) == ["reward_mean", "reward/exact"]
    figure = drawn([{"step": 1, "loss": -0.5}, {"step": 2, "loss": 0.5}])["loss"]
    assert not figure["log"] and "log scale" not in figure["unit"]
    assert drawn([{"step": 1, "loss": 0.5}])["loss"]["log"]


def test_series_has_gaps_where_the_metric_has() -> None:
    rows: list[dict[str, Any]] = [{"a": 1}, {"a": None}, {}, {"a": "text"}, {"a": 2.5}, {"a": 10**400}, {"a": math.nan}]
    assert [None if math.isnan(value) else value for value in series(rows, "a")] == [
        1,
        None,
        None,
        None,
        2.5,
        None,
        None,
    ]


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4), count=st.integers(4, 20))
def test_shown_prompts_are_in_proportion(sizes: list[int], count: int) -> None:
    groups = {str(name): [({"n": index}, None) for index in range(size)] for name, size in enumerate(sizes)}
    shown = choose(groups, count)
    assert sum(map(len, shown.values())) == min(count, sum(sizes))
    for name, size in enumerate(sizes):
        pairs = shown[str(name)]
        assert pairs == groups[str(name)][: len(pairs)] and len(pairs) >= 1
        # Never more than one above its share of the places, but for the one that every outcome has.
        assert len(pairs) <= max(1, count * size / sum(sizes) + 1)
