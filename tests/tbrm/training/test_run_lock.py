"""A run's folder has one owner, for as long as that lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tbrm.config.section import ConfigError
from tbrm.training import run_lock
from tbrm.training.run_lock import RunLock

HOLD = """
import sys
from pathlib import Path
from tbrm.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_is_trained_in_is_refused_and_its_owner_named_until_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_PATIENCE_SECONDS", 20.0)
    run = tmp_path / "run"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdin=pipe, stdout=pipe, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        named = rf"run.dir: '{run}' is being trained in by process {owner.pid} on {os.uname().nodename} since 20\d\d-"
        with pytest.raises(ConfigError, match=named), RunLock(run):
            pass
        # Killed hard, it leaves nothing behind; with resume, one that is about to end is waited for.
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -{signal.SIGKILL.value} {owner.pid}"])
        with RunLock(run, resume=True):
            assert owner.wait(20) == -signal.SIGKILL
            assert (run / run_lock.LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    with RunLock(run):
        pass
