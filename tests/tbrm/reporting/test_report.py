"""The report of a run: what it says, for whole, running and killed runs, and that nothing in it runs or is fetched."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from tbrm.reporting.facts import choose
from tbrm.reporting.metrics import MetricsLog
from tbrm.reporting.page import write_report
from tbrm.reporting.plots import PANELS, draw_all, series, to_svg
from tests.tbrm.reporting.made_run import ATTACK, CONFIG, make_run, metrics_of, sample, write_samples


class Page(HTMLParser):
    """The text of a page and its elements; fails on tags that do not match."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.words.append(data)


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
    titles = ["Accuracy on held-out prompts", "Reward on held-out prompts", *panels, "Seconds per step by phase"]
    places = [page.text.find(title) for title in titles]
    assert -1 not in places and places == sorted(places)
    assert [tag for tag, _ in page.elements].count("svg") == len(titles) + 1  # the first in two sizes
    for words in ("mean over trajectories, log scale", "rollout", "update"):
        assert words in page.text


def test_text_of_plots_is_as_large_on_a_phone_as_that_of_the_page(page: Page) -> None:
    """A screen of 390 pixels has 340 for a plot, which 9 points stay 12 pixels on up to 3.6 inches."""
    widths = [float((attributes["viewbox"] or "").split()[2]) / 72 for tag, attributes in page.elements if tag == "svg"]
    assert widths[0] > 5 and max(widths[1:]) <= 3.61
    wide, narrow = (page.source.index(f'<figure class="card {name}">') for name in ("wide", "narrow"))
    assert wide < narrow < page.source.index('<div class="plots">')
    [phone] = re.findall(r"@media \(max-width: 640px\) \{(.*?)\n\}", page.source, re.DOTALL)
    assert ".wide { display: none; }" in phone and ".narrow { display: block; }" in phone


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
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_the_page_fetches_nothing(page: Page) -> None:
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}:
                assert value is not None and value.startswith("#")
    assert "@import" not in page.source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page.source))
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_plots_lie_beside_the_page(page: Page, run_dir: Path) -> None:
    names = {path.name for path in (run_dir / "plots").iterdir()}
    assert names == {"accuracy.png", "heldout_reward.png", "seconds.png", *(f"{panel.key}.png" for panel in PANELS)}
    for name in names:
        pixels = imread(run_dir / "plots" / name)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 500
        assert tuple(pixels[0, 0, :3]) == (1, 1, 1), "white, wherever it is shown"
        assert len({tuple(pixel) for pixel in pixels[:, :, :3].reshape(-1, 3)[::7]}) > 3, "something is drawn"


def test_the_page_takes_its_colours_from_the_style_sheet(page: Page) -> None:
    """Every colour of a plot is a variable that is defined twice: light and dark."""
    plots = page.source[page.source.index("<svg") :]
    used = set(re.findall(r"var\((--\w+)\)", plots))
    assert used >= {"--ink", "--muted", "--grid", "--blue"}
    for name in used:
        assert page.source.count(f"{name}: #") == 2
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", plots)


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
        assert "svg" not in {tag for tag, _ in page.elements}
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
    assert "20.0% → 55.0%" in text, "from result.json"


def test_text_that_no_file_can_hold_does_not_stop_the_report(tmp_path: Path) -> None:
    write_samples(tmp_path, 0, [sample(0, correct=False, response="half a pair: \ud83d, nothing: \x00")])
    assert "half a pair: ?, nothing:" in Page(write_report(tmp_path)).text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds nothing of a run.*metrics.jsonl is missing"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_long_runs_are_drawn_with_a_bounded_number_of_points() -> None:
    def size(steps: int) -> int:
        rows = [{"step": step, "reward_mean": math.sin(step)} for step in range(1, steps + 1)]
        return len(to_svg(draw_all(rows, [])["reward_mean"]))

    assert size(20_003) < 1.2 * size(2_001)


def test_a_loss_that_is_not_positive_is_drawn_on_a_linear_scale() -> None:
    assert list(draw_all([{"step": 1, "reward_mean": 1.2, "reward/exact": 1.0}], [])) == ["reward_mean", "reward_exact"]
    figure = draw_all([{"step": 1, "loss": -0.5}, {"step": 2, "loss": 0.5}], [])["loss"]
    assert figure.axes[0].get_yscale() == "linear"
    assert "log scale" not in to_svg(figure)


def test_series_has_gaps_where_the_metric_has() -> None:
    rows: list[dict[str, Any]] = [{"a": 1}, {"a": None}, {}, {"a": "text"}, {"a": 2.5}]
    assert [value if math.isfinite(value) else None for value in series(rows, "a")] == [1.0, None, None, None, 2.5]


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
