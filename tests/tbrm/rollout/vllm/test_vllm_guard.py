"""What guards a vLLM server, with a command of our own in the server's place: no vLLM is needed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tbrm.rollout.vllm import guard, process

# Takes shared memory and a semaphore, and is gone at once with all it holds, as a server is whose worker was killed.
SERVER = """
    import mmap, os, tempfile, time
    from _multiprocessing import SemLock
    handle, path = tempfile.mkstemp(dir="/dev/shm", prefix="psm_tbrm_test_")
    os.ftruncate(handle, 4096)
    held = mmap.mmap(handle, 4096)
    name = os.path.basename(path)
    semaphore = SemLock(1, 1, 1, "/" + name, False)
    print(path, "/dev/shm/sem." + name, flush=True)
    time.sleep(3)
    os._exit(1)
"""


@contextmanager
def guarded() -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """A guard with its server, and the server's shared memory and semaphore."""
    command = [sys.executable, "-S", guard.__file__, "server", sys.executable, "-c", textwrap.dedent(SERVER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
    ) as process:
        assert process.stdout is not None
        paths = [Path(name) for name in process.stdout.readline().split()]
        try:
            assert len(paths) == 2
            assert all(path.exists() for path in paths)
            yield process, paths
        finally:
            for path in paths:
                path.unlink(missing_ok=True)


def test_shared_memory_of_a_server_that_is_gone_before_the_guard_looks() -> None:
    with guarded() as (process, paths):
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert "exit code 1" in process.stdout.read()
        assert not any(path.exists() for path in paths)


def test_shared_memory_of_a_server_whose_guard_was_killed() -> None:
    with guarded() as (process, paths):
        process.kill()
        process.wait()
        assert guard.members(process.pid)
        guard.kill_group(process.pid)
        assert not guard.members(process.pid)
        assert not any(path.exists() for path in paths)


def test_a_guard_whose_server_cannot_be_started_ends_and_says_why() -> None:
    with subprocess.Popen(
        [sys.executable, "-S", guard.__file__, "server", "/no/such/program"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    ) as started:
        assert started.wait(30) == 0
        assert started.stdout is not None
        assert "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/program'" in started.stdout.read()


def test_processes_that_nothing_can_kill_are_waited_for_no_longer_than_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.2)
    monkeypatch.setattr(guard, "members", lambda _: [2**22 + 1])  # no such process: signals to it do nothing
    assert guard.kill_group(2**22 + 1) == [2**22 + 1]
    guard.kill_others()
    assert f"processes [{2**22 + 1}] of the server could not be killed" in capsys.readouterr().out


def test_a_folder_that_cannot_be_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.2)
    monkeypatch.setattr(guard.shutil, "rmtree", lambda *_, **__: None)
    guard.delete(str(tmp_path))
    monkeypatch.undo()
    guarding = process.FolderGuard(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda _: True)
    guarding.stop()
    assert f"not all of {tmp_path} could be deleted" in capsys.readouterr().err
