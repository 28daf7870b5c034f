"""What a person sees while a run goes: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tbrm.reporting import progress
from tbrm.reporting.progress import Progress, alive
from tests.tbrm.terminal import on_a_terminal

STEPS = """
from tbrm.reporting.progress import Progress
with Progress(steps=3, done=1) as progress:
    progress.evaluated(accuracy=0.725, reward_mean=0.731)
    progress.advance({"step": 2, "reward_mean": 0.5, "residual_mean": -1.25, "tokens_per_second": 812.3})
    progress.say("half way")
    progress.advance({"step": 3, "reward_mean": 1.0})
"""
FIGURES = "held-out 72.5% (reward 0.73), reward 0.50, 812 tokens/s"

EVALUATION = """
import time
from tbrm.reporting import progress
progress.LOG_SECONDS = 0.2
with progress.Progress(steps=3) as steps:
    with progress.alive("evaluation after step 0", 8) as watch:
        watch(3)
        time.sleep(1.2)
        watch(5)
    steps.say("evaluated")
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def without_a_terminal(script: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_the_bar_shows_the_run_and_leaves_lines_above_it_whole() -> None:
    written = on_a_terminal(STEPS)
    assert "step 1/3" in written and "step 3/3" in written
    assert re.search(r"00:0\d left, " + re.escape(FIGURES), written)
    assert "\rhalf way\r\n" in written


def test_a_terminal_of_eighty_columns_has_room_for_all_figures() -> None:
    script = STEPS.replace("steps=3, done=1", "steps=48, done=1")
    assert FIGURES in on_a_terminal(script, columns=80)


def test_an_evaluation_shows_how_far_it_is_and_goes_when_it_is_over() -> None:
    written = on_a_terminal(EVALUATION)
    assert re.search(r"evaluation after step 0: 3/8 responses .*00:01", written)
    assert "evaluation after step 0" not in written.split("evaluated")[-1]


def test_a_log_file_has_the_same_figures_in_lines() -> None:
    out, err = without_a_terminal(STEPS)
    assert out == "half way\n"
    assert re.fullmatch(r"step 2/3: 00:0\d left, " + re.escape(FIGURES) + "\n", err)
    out, err = without_a_terminal(EVALUATION)
    assert out == "evaluated\n"
    lines = err.splitlines()
    assert 2 <= len(lines) <= 6
    assert {*lines} <= {f"evaluation after step 0: 3 of 8 responses after {seconds} s" for seconds in (0, 1)}


def test_a_log_file_has_a_line_every_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(steps=1000) as steps:
        for _ in range(1000):
            clock[0] += 1
            steps.advance({})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/")[0] for line in lines] == [f"step {step}" for step in range(1, 1001, 30)]


def test_the_time_left_is_that_of_recent_steps_and_not_of_the_evaluation_before_them(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(steps=1100) as steps:
        clock[0] += 3600
        steps.evaluated(0.0, 0.0)
        clock[0] += 30
        steps.advance({})
        for _ in range(99):
            clock[0] += 60
            steps.advance({})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 1/1100: 9:09:30 left, held-out 0.0%")
    assert lines[-1].startswith("step 100/1100: 16:40:00 left")


def test_progress_needs_none_of_the_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(steps=1) as steps:
        steps.advance({})
    assert capsys.readouterr().err == "step 1/1: 00:00 left\n"


def test_what_is_not_to_be_shown_is_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    with alive("waiting", shown=False) as watch:
        watch(1)
        progress.time.sleep(0.1)
    assert capsys.readouterr() == ("", "")
