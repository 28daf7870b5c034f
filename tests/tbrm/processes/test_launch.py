"""Runs of several processes as clusters start and end them: by other launchers than torchrun, and by ones that are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tbrm.commands.cli import main
from tbrm.experience.record import record
from tbrm.reporting.metrics import read_jsonl
from tbrm.training.run_lock import RunLock
from tests.tbrm.conftest import tiny_config
from tests.tbrm.started import torchrun
from tests.tbrm.training.test_faults import ENVIRONMENT, children, wait_for_step, write_recipe

FAILS = textwrap.dedent(
    """
    import os, sys, time
    from tbrm.processes import watch
    from tbrm.training import trainer
    from tbrm.commands.cli import main
    watch.GRACE_SECONDS = 1.0
    real = trainer.Trainer._clip_gradients
    def clip(self, *arguments):
        if self.state.step == 2:
            if os.environ["SLURM_PROCID"] == "1":
                raise ValueError("not this gradient")
            time.sleep(10_000)  # as one that waits in NCCL, which no closed connection wakes
        return real(self, *arguments)
    trainer.Trainer._clip_gradients = clip
    sys.exit(main(sys.argv[1:]))
    """
)


def start_two(environments: list[dict[str, str]], *command: str | Path) -> list[tuple[int, str, str]]:
    """`python -m COMMAND` in two processes that no launcher watches over; returns how each has ended, and what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            env={**ENVIRONMENT, **meeting, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for env in environments
    ]
    said = [process.communicate(timeout=200) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def test_processes_that_another_launcher_has_numbered_are_one_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, trainer__steps=3)
    numbered = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    (first, said, errors), (second, silent, _) = start_two(numbered, "tbrm", "train", recipe)
    assert (first, second) == (0, 0), errors
    assert "holds the run" in said and silent == ""
    run = tmp_path / "run"
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3]
    assert len(list((run / "checkpoints" / "latest").glob("shard-*.safetensors"))) == 2


def test_an_error_of_one_process_ends_all_and_is_named_by_all(tmp_path: Path) -> None:
    """Without a launcher that would end the others, with parallel.timeout at half an hour."""
    (tmp_path / "fails.py").write_text(FAILS)
    recipe = write_recipe(tmp_path)
    tasks = [
        {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
        for rank in (0, 1)
    ]
    (waiting, _, named), (failed, _, own) = start_two(tasks, "fails", "train", recipe)
    assert (waiting, failed) == (1, 1)
    assert "tbrm train: not this gradient" in own or "ValueError: not this gradient" in own
    assert f"rank 0: rank 1 on {socket.gethostname()} has failed: ValueError: not this gradient" in named


def test_a_size_without_a_rank_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", str(write_recipe(tmp_path))]) == 1
    assert capsys.readouterr().err.startswith("tbrm train: WORLD_SIZE is 4 and RANK is missing")
    assert not (tmp_path / "run").exists()


def test_workers_end_with_their_launcher_and_their_step_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = write_recipe(tmp_path, trainer__steps=100_000), tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    with subprocess.Popen(
        [*launcher, "tbrm", "train", str(recipe)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    ) as agent:
        wait_for_step(run, 2, agent)
        workers = children(agent.pid)
        assert len(workers) == 2
        # Beside it, nobody else may train there.
        assert main(["train", str(recipe), "--overwrite"]) == 1
        refusal = capsys.readouterr().err
        assert any(f"is being trained in by process {pid} on {socket.gethostname()}" in refusal for pid in workers)
        agent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/fd").exists() and os.path.exists(f"/proc/{pid}/exe") for pid in workers):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.2)
    last = read_jsonl(run / "metrics.jsonl")[-1]["step"]
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{last:06d}"
    with RunLock(run):  # free for who goes on
        pass


def test_rollouts_are_divided_and_one_process_writes_them(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = torchrun(2, "tbrm", "rollout", recipe, "--out", tmp_path / "two.jsonl")
    assert done.stdout.count("trajectories written") == 1
    config = tiny_config(tmp_path / "run", evaluation={"prompts": 0}, task={"name": "echo"})
    record(config, tmp_path / "one.jsonl", 1)
    two, one = (read_jsonl(tmp_path / name) for name in ("two.jsonl", "one.jsonl"))
    for row in one:
        row["response_logprobs"] = pytest.approx(row["response_logprobs"], abs=1e-5)  # other rows beside them
    assert two == one
