"""Which signals are one, and which a second."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch.distributed as dist

from tbrm.processes import watch
from tbrm.processes.watch import Watch
from tbrm.training import interruption
from tbrm.training.interruption import Interruption


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    return now


def test_signals_of_the_same_moment_are_one(clock: list[float]) -> None:
    """As a scheduler sends them: to each process directly, and once more through its launcher."""
    with Interruption() as noted:
        for seconds, number in ((0, signal.SIGTERM), (0.5, signal.SIGTERM), (0.9, signal.SIGINT), (5, signal.SIGTERM)):
            clock[0] = 100.0 + seconds
            os.kill(os.getpid(), number)
            assert noted.signal == signal.SIGTERM


def test_a_persons_second_ctrl_c_acts_at_once(clock: list[float]) -> None:
    with pytest.raises(KeyboardInterrupt), Interruption() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.signal == signal.SIGINT
        clock[0] += 1.5
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("number", "again"),
    [
        (signal.SIGINT, "Ctrl-C once more stops at once"),
        (signal.SIGTERM, "another SIGTERM, after ten seconds, stops at once"),
    ],
)
def test_what_is_finished_first_is_said_and_what_a_second_signal_does(
    capfd: pytest.CaptureFixture[str], number: signal.Signals, again: str
) -> None:
    until = "under way is finished and a checkpoint written before the run is left"
    with Interruption():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert capfd.readouterr().err == f"\n{number.name}: the step {until}; {again}\n"
    with Interruption() as noted, noted.finishing("the evaluation"):
        os.kill(os.getpid(), number)
    assert capfd.readouterr().err == f"\n{number.name}: the evaluation {until}; {again}\n"
    with Interruption(says=False):  # all processes but one
        os.kill(os.getpid(), number)
    assert capfd.readouterr().err == ""


def test_a_second_sigterm_acts_after_ten_seconds(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    acted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: acted.append(number))
    try:
        with Interruption():
            os.kill(os.getpid(), signal.SIGTERM)
            clock[0] += 9
            os.kill(os.getpid(), signal.SIGTERM)
            assert acted == []
            clock[0] += 2
            os.kill(os.getpid(), signal.SIGTERM)
            assert acted == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("launcher_goes_first", [False, True])
def test_a_launcher_that_goes_away_is_never_one_of_two_signals(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, launcher_goes_first: bool
) -> None:
    acted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: acted.append(number))
    parents, sent, really_kill = [1], threading.Event(), os.kill

    def kill(pid: int, number: int) -> None:
        really_kill(pid, number)
        sent.set()

    monkeypatch.setattr(watch, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(os, "getppid", lambda: parents[0])
    monkeypatch.setattr(os, "kill", kill)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watching = Watch(store, 0, 1, under_launcher=True, hosts_store=False)
    try:
        with Interruption() as noted:
            for launchers in (launcher_goes_first, not launcher_goes_first):
                if launchers:
                    sent.clear()
                    parents[0] = 2
                    assert sent.wait(10)
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
                assert (noted.signal, acted) == (signal.SIGTERM, [])
                clock[0] += 11
            if launcher_goes_first:
                os.kill(os.getpid(), signal.SIGTERM)
                assert acted == [signal.SIGTERM]
    finally:
        watching.end()
        signal.signal(signal.SIGTERM, before)
