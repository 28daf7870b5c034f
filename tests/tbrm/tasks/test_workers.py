from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tbrm.tasks.workers import Outcome, Workers

GIB = 2**30

FUNCTIONS = """
    import os, sys, threading, time

    def add(a, b):
        return a + b

    def pid():
        return os.getpid()

    def hang():  # in one long operation that no Python signal handler can break into
        return 9 ** 9 ** 9

    def crash():
        os._exit(3)

    def fill():
        return len(bytearray(8 * 2**30))

    def fail():
        raise KeyError("no such thing")

    def recurse():
        return recurse()

    def main_thread():
        return threading.current_thread() is threading.main_thread()

    def chatter():
        print("to standard output")
        os.write(1, b"and past sys.stdout")
        return "heard"

    def nap(seconds):
        time.sleep(seconds)
        return seconds
"""


def exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "worker_functions.py").write_text(textwrap.dedent(FUNCTIONS))
    monkeypatch.syspath_prepend(tmp_path)
    return "worker_functions"


@pytest.fixture
def workers(functions: str) -> Iterator[Workers]:
    workers = Workers(functions, count=1, memory_bytes=GIB)
    yield workers
    workers.close()


def test_calls_return_values_in_order(functions: str) -> None:
    workers = Workers(functions, count=2, memory_bytes=GIB)
    outcomes = workers.map("add", [(i, i) for i in range(50)], seconds=60)
    assert outcomes == [Outcome(2 * i) for i in range(50)]
    workers.close()


def test_one_process_serves_many_calls(workers: Workers) -> None:
    assert workers.call("pid", seconds=60) == workers.call("pid", seconds=60)


def test_text_of_any_kind_passes(workers: Workers) -> None:
    text = "é\x00\ud800\n" + "x" * 10**6
    assert workers.call("add", text, "!", seconds=60) == Outcome(text + "!")


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        ("fail", "KeyError: 'no such thing'"),
        ("fill", "MemoryError: "),
        ("recurse", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_what_the_function_raises_is_a_failure(workers: Workers, function: str, failure: str) -> None:
    before = workers.call("pid", seconds=60)
    outcome = workers.call(function, seconds=60)
    assert outcome.value is None
    assert outcome.failure is not None
    assert outcome.failure.startswith(failure)
    assert workers.call("pid", seconds=60) == before


def test_a_call_that_hangs_is_killed_and_the_next_one_works(workers: Workers) -> None:
    process = workers.call("pid", seconds=60).value
    assert workers.call("hang", seconds=1) == Outcome(failure="took longer than 1 seconds")
    assert not exists(process)
    assert workers.call("add", 1, 2, seconds=60) == Outcome(3)


def test_a_call_that_takes_its_process_down_is_a_failure_and_the_next_one_works(workers: Workers) -> None:
    assert workers.call("crash", seconds=60) == Outcome(failure="took its process down (exit code 3)")
    assert workers.call("add", 1, 2, seconds=60) == Outcome(3)


def test_a_process_killed_while_working_is_a_failure_and_the_next_call_works(workers: Workers) -> None:
    process = workers.call("pid", seconds=60).value
    threading.Timer(0.5, os.kill, (process, signal.SIGKILL)).start()
    assert workers.call("hang", seconds=60) == Outcome(failure="took its process down (signal 9)")
    assert workers.call("add", 1, 2, seconds=60) == Outcome(3)


def test_a_process_killed_while_idle_is_replaced(workers: Workers) -> None:
    process = workers.call("pid", seconds=60).value
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert workers.call("add", 1, 2, seconds=60) == Outcome(3)


def test_hanging_calls_do_not_disturb_others(functions: str) -> None:
    workers = Workers(functions, count=2, memory_bytes=GIB)
    workers.map("pid", [(), ()], seconds=60)
    outcomes = workers.map("nap", [(0,), (60,), (0.25,), (60,), (0.5,)], seconds=2)
    slow = Outcome(failure="took longer than 2 seconds")
    assert outcomes == [Outcome(0), slow, Outcome(0.25), slow, Outcome(0.5)]
    workers.close()


def test_an_interrupted_call_leaves_no_stale_reply(workers: Workers) -> None:
    """Ctrl-C while waiting: the reply of the broken-off call must not be taken for that of the next one."""
    workers.call("pid", seconds=60)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    threading.Timer(0.3, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        workers.call("nap", 1, seconds=60)
    assert workers.call("add", 1, 2, seconds=60) == Outcome(3)


def test_an_interrupt_from_the_terminal_leaves_the_processes_alone(workers: Workers) -> None:
    process = workers.call("pid", seconds=60).value
    os.kill(process, signal.SIGINT)  # the terminal sends it to the whole process group
    assert workers.call("pid", seconds=60) == Outcome(process)


def test_calls_from_other_threads_run_in_the_main_thread_of_the_process(workers: Workers) -> None:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(workers.call("main_thread", seconds=60)))
    thread.start()
    thread.join()
    assert outcomes == [Outcome(True)]


def test_what_the_functions_print_goes_nowhere(workers: Workers, capfd: pytest.CaptureFixture[str]) -> None:
    assert workers.call("chatter", seconds=60) == Outcome("heard")
    assert capfd.readouterr() == ("", "")


def test_closing_ends_the_processes(functions: str) -> None:
    workers = Workers(functions, count=1, memory_bytes=GIB)
    process = workers.call("pid", seconds=60).value
    workers.close()
    assert not exists(process)


def test_a_module_that_cannot_be_imported_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    workers = Workers("tbrm.tasks.no_such_module", count=1, memory_bytes=GIB)
    with pytest.raises(RuntimeError, match=r"worker process for tbrm\.tasks\.no_such_module ended before it was ready"):
        workers.call("anything", seconds=60)
    assert "No module named 'tbrm.tasks.no_such_module'" in capfd.readouterr().err


def test_a_hanging_process_does_not_outlive_a_killed_trainer(functions: str) -> None:
    program = f"""
    from tbrm.tasks.workers import Workers
    workers = Workers({functions!r}, count=1, memory_bytes=2**30)
    print(workers.call("pid", seconds=60).value, flush=True)
    workers.call("hang", seconds=2)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    time.sleep(0.5)  # it hangs
    trainer.kill()
    trainer.wait()
    assert exists(worker)
    for _ in range(600):
        if not exists(worker):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {worker} goes on without its trainer")
