"""What the terminal shows of a run: what was learnt, three problems, the cost and where the page is."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tbrm.reporting.metrics import MetricsLog
from tbrm.reporting.summary import conclude, print_summary, summary_lines
from tests.tbrm.reporting.made_run import ATTACK, make_run, metrics_of, sample, write_samples


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "whole")


def test_the_summary_says_what_was_learnt_how_and_at_what_cost(run_dir: Path) -> None:
    assert summary_lines(run_dir, width=80) == [
        "accuracy  ▄█ 20.0% (8.1–41.6%) -> 55.0% (34.2–74.2%) on 20 held-out prompts",
        "reward    ▄█ 0.3125 -> 0.75, their mean",
        "training  objective tbrm, beta 0.002, steps 4, seed 3",
        "setting   model models/small, task chain_sum",
        "cost      training time 8 min 13 s, tokens generated 10,000, tokens trained on 12,000, throughput 250 tokens/s, "
        "peak memory 2,004 MiB",
        "",
        "fixed (8 of 20): Prompt number 4",
        "  answer: answer 4",
        "  before (reward 0): So it is 7.",
        f"  after (reward 1): {ATTACK[:59]}…",
        "",
        "broke (1 of 20): Prompt number 0",
        "  answer: answer 0",
        "  before (reward 1): So it is 7.",
        f"  after (reward 0): {ATTACK[:59]}…",
        "",
        "still wrong (8 of 20): Prompt number 12",
        "  answer: answer 12",
        "  before (reward 0): So it is 7.",
        f"  after (reward 0): {ATTACK[:59]}…",
        "",
    ]


def test_bars_run_from_nothing_to_the_best_and_name_their_steps(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step, accuracy in enumerate((0.1, 0.2, 0.4, 0.8, 0.6)):
            log.log_eval(12 * step, {"accuracy": accuracy, "n": 10, "reward_mean": -accuracy})
    accuracy, reward, *_ = summary_lines(tmp_path)
    assert accuracy == "accuracy  ▂▃▅█▆ 10.0% -> 60.0% on 10 held-out prompts, at steps 0, 12, 24, 36, 48"
    assert reward == "reward    ▇▆▅▁▃ -0.1 -> -0.6, their mean"


def test_a_long_run_has_a_bounded_number_of_bars(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1001):
            log.log_eval(step, {"accuracy": step / 1000})
    bars = summary_lines(tmp_path)[0].split()[1]
    assert (len(bars), bars[0], bars[-1]) == (40, "▁", "█")


def test_a_shaped_reward_that_rises_is_seen_where_nothing_counts_as_correct(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step, reward in enumerate((0.1, 0.3, 0.6)):
            log.log_eval(step, {"accuracy": 0.0, "n": 10, "reward_mean": reward})
    accuracy, reward, *_ = summary_lines(tmp_path)
    assert accuracy.startswith("accuracy  ▁▁▁ 0.0% -> 0.0%")
    assert reward == "reward    ▂▅█ 0.1 -> 0.6, their mean"


def test_a_run_without_evaluations_shows_the_reward_of_training(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, metrics_of(step))
    assert summary_lines(tmp_path)[1] == "reward    ▃▆█ in training"


def test_a_killed_run_has_a_summary_of_how_far_it_came(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "result.json").write_text('{"accuracy_bef')
    for name in ("metrics.jsonl", "eval.jsonl", "samples/step-000004.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-20])
    assert summary_lines(tmp_path)[:2] == [
        "accuracy  20.0% (8.1–41.6%) -> not evaluated on 20 held-out prompts",
        "reward    0.3125 -> not evaluated, their mean",
    ]


def test_the_result_alone_gives_the_figures(tmp_path: Path) -> None:
    make_run(tmp_path)
    for name in ("config.yaml", "metrics.jsonl", "eval.jsonl"):
        (tmp_path / name).unlink()
    assert summary_lines(tmp_path)[:4] == [
        "accuracy  20.0% -> 55.0% on 20 held-out prompts",
        "training  objective tbrm, steps 4, seed 3",
        "setting   model models/small",
        "cost      training time 8 min 13 s",
    ]


def test_a_problem_not_asked_again_yet_says_so(tmp_path: Path) -> None:
    write_samples(tmp_path, 0, [sample(0, correct=False)])
    assert summary_lines(tmp_path)[-3:] == ["  before (reward 0): So it is 7.", "  after: not asked again yet", ""]


def test_no_text_of_a_model_reaches_the_terminal_as_anything_but_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path, 0, [sample(0, correct=False, response="a\x1b[2Jb\r\n\tc \ud83d\x9b d é")])
    assert "  before (reward 0): a [2Jb c d é" in summary_lines(tmp_path)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    print_summary(tmp_path, "nowhere")
    out.seek(0)
    assert "a [2Jb c d ?\n" in out.read()


def test_a_run_that_ends_leaves_its_page_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conclude(make_run(tmp_path), page=True)
    lines = capsys.readouterr().out.splitlines()
    page = tmp_path / "report.html"
    assert (lines[0], lines[-1]) == (f"{tmp_path} holds the run", f"report    {page}")
    assert page.read_text().startswith("<!doctype html>")


def test_a_run_says_how_to_get_the_page_that_was_not_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conclude(make_run(tmp_path), page=False)
    assert capsys.readouterr().out.splitlines()[-1] == f"report    `tbrm report {tmp_path}` writes it"
    assert not (tmp_path / "report.html").exists()
