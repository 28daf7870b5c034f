"""What code could do that got past a grader's guard: these functions run as that code would."""

from __future__ import annotations

import os
import platform
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tbrm.tasks.sandbox import refused_calls
from tbrm.tasks.workers import Workers

FUNCTIONS = """
    import ctypes, fcntl, os, socket, struct, subprocess, sys, threading

    theirs = int(sys.argv[1])  # our end of the socket to the trainer

    def environment():
        return dict(os.environ)

    def read(path):
        return open(path).read()

    def write(path):
        open(path, "w")

    def append(path):
        os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b"more")

    def delete(path):
        os.remove(path)

    def move(path):
        os.rename(path, path + ".moved")

    def lock_out(path):
        os.chmod(path, 0)

    def connect(port):
        socket.create_connection(("127.0.0.1", port))

    def listen():
        socket.socket(socket.AF_UNIX)

    def pair():
        socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def send():
        socket.socket(fileno=os.dup(theirs)).send(b"")

    def own(process):
        fcntl.fcntl(theirs, fcntl.F_SETOWN, process)

    def own_extended(process):
        fcntl.fcntl(theirs, 15, struct.pack("ii", 1, process))

    def own_by_ioctl(process):
        fcntl.ioctl(theirs, 0x8901, struct.pack("i", process))

    def choose_signal(process):
        fcntl.fcntl(theirs, 10, 9)

    def slow_down(process):
        os.sched_setaffinity(process, {0})

    def call(number):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(ctypes.c_long(number), 0, 0, 0, 0, 0, 0) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def execute():
        subprocess.run(["true"])

    def fork():
        os.fork()

    def kill(process):
        os.kill(process, 9)

    def say():
        return os.write(2, b"to the terminal")

    def import_late():
        import sympy.physics.units, wave, zoneinfo
        return str(zoneinfo.ZoneInfo("Europe/Paris"))
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "sandboxed_functions.py").write_text(textwrap.dedent(FUNCTIONS))
    (folder / ".env").write_text("SECRET=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("SECRET_KEY", "hunter2")
        workers = Workers("sandboxed_functions", count=1, memory_bytes=2**30)
        yield workers
    workers.close()


@pytest.fixture(scope="module")
def missing() -> str:
    """What this machine does not let a worker give up."""
    workers = Workers("tbrm.tasks.sandbox", count=1, memory_bytes=2**30)
    outcome = workers.call("confine", seconds=60)
    workers.close()
    assert outcome.failure is None
    return "\n".join(outcome.value)


def refused(worker: Workers, function: str, *arguments: object) -> None:
    outcome = worker.call(function, *arguments, seconds=60)
    assert outcome.failure is not None
    assert outcome.failure.startswith("PermissionError"), outcome


def test_the_environment_is_empty(worker: Workers) -> None:
    environment = worker.call("environment", seconds=60).value
    assert "SECRET_KEY" not in environment
    assert "PATH" not in environment
    assert environment["HOME"] == environment["TMPDIR"] != os.environ.get("HOME")


def test_the_working_directory_is_an_empty_one_that_goes_with_the_process() -> None:
    workers = Workers("os", count=1, memory_bytes=2**30)
    folder = workers.call("getcwd", seconds=60).value
    assert list(Path(folder).iterdir()) == []
    workers.close()
    assert not Path(folder).exists()


@pytest.mark.parametrize("change", ["write", "append", "delete", "move", "lock_out"])
def test_no_file_can_be_changed(worker: Workers, missing: str, change: str, tmp_path: Path) -> None:
    if "seccomp" in missing:
        pytest.skip(missing)
    path = tmp_path / "file"
    path.write_text("as it was")
    path.chmod(0o666)
    refused(worker, change, str(path))
    assert path.read_text() == "as it was"
    assert path.stat().st_mode & 0o777 == 0o666
    refused(worker, "write", "in_its_own_folder")


def test_no_file_but_pythons_own_can_be_read(worker: Workers, missing: str, tmp_path: Path) -> None:
    if "Landlock" in missing:
        pytest.skip(missing)
    (tmp_path / "secret").write_text("hunter2")
    for path in (tmp_path / "secret", "/etc/passwd", f"/proc/{os.getpid()}/environ", Path(__file__)):
        refused(worker, "read", str(path))
    assert worker.call("import_late", seconds=60).value == "Europe/Paris"


def test_beside_a_module_on_the_path_nothing_can_be_read(worker: Workers, missing: str) -> None:
    """A project's folder may be on the path, and hold anything."""
    if "Landlock" in missing:
        pytest.skip(missing)
    [folder] = [
        each for each in worker.call("environment", seconds=60).value["PYTHONPATH"].split(":") if "functions" in each
    ]
    assert worker.call("read", f"{folder}/sandboxed_functions.py", seconds=60).failure is None
    refused(worker, "read", f"{folder}/.env")


@pytest.mark.parametrize("function", ["connect", "listen", "pair", "send", "execute", "fork"])
def test_nobody_can_be_reached_and_nothing_started(worker: Workers, missing: str, function: str) -> None:
    if "seccomp" in missing:
        pytest.skip(missing)
    refused(worker, function, *([9] if function == "connect" else []))


@pytest.mark.parametrize("function", ["kill", "own", "own_extended", "own_by_ioctl", "choose_signal", "slow_down"])
def test_the_trainer_cannot_be_signalled_or_slowed(worker: Workers, missing: str, function: str) -> None:
    """Nor by a signal that the kernel sends when the trainer writes into its socket."""
    if "seccomp" in missing:
        pytest.skip(missing)
    refused(worker, function, os.getpid())


def test_each_refused_call_is_refused(worker: Workers, missing: str) -> None:
    """Shared memory and queues among them. All arguments are 0: some would fail anyway, but not for want of permission."""
    if "seccomp" in missing:
        pytest.skip(missing)
    calls = refused_calls(platform.machine())
    assert {"shmget", "shmat", "semget", "msgget", "mq_open", "sendmsg", "bind", "setxattrat"} <= calls.keys()
    for number in calls.values():
        refused(worker, "call", number)


def test_the_terminal_is_not_theirs(worker: Workers, capfd: pytest.CaptureFixture[str]) -> None:
    assert worker.call("say", seconds=60).value == len("to the terminal")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("machine", "header", "prefix"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "__NR_"),
        ("aarch64", "/usr/include/asm-generic/unistd.h", "__NR3264_|__NR_"),
    ],
)
def test_the_numbers_of_system_calls_are_those_of_linux(machine: str, header: str, prefix: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"no {header}")
    lines = re.findall(rf"#define (?:{prefix})(\w+) (\d+)", Path(header).read_text())
    numbers = {name: int(number) for name, number in lines}
    calls = refused_calls(machine)
    assert {name: numbers.get(name, number) for name, number in calls.items()} == calls
    assert len(calls.keys() & numbers.keys()) > 40
