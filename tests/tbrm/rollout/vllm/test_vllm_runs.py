"""Runs with real vLLM servers of their own on the CPU: every way for weights to travel, and what is left of a run."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tbrm.config.recipe import config_to_dict, load_config
from tbrm.reporting.metrics import read_jsonl
from tbrm.rollout.vllm import broadcast
from tbrm.rollout.vllm.connection import ServerError
from tbrm.rollout.vllm.server import Server
from tbrm.tasks import ProblemStream
from tbrm.training.checkpoint import Checkpoint
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import TINY
from tests.tbrm.rollout.vllm.served import Left, engine_of, guards_of, kill_core_of_a_call, kill_worker, wait_until
from tests.tbrm.rollout.vllm.vllm_runs import OPTIONS, assert_answers_are_the_policys, save_model, vllm_config
from tests.tbrm.started import torchrun

pytest.importorskip("vllm", reason="vLLM is not installed")


def test_a_head_of_its_own_and_a_server_killed_during_two_syncs_and_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_before = set(Path("/dev/shm").iterdir())
    # A call that waited for its time limit would leave no time for a restart.
    model = save_model(tmp_path / "model", tied=False)
    trainer = Trainer(vllm_config(tmp_path / "run", model, request_timeout=600, start_timeout=600))
    engine = engine_of(trainer)
    call, step, left, kills = Server.call, Trainer.train_step, [], [kill_core_of_a_call, kill_worker]

    def killed_twice(server: Server, method: str, path: str, *arguments: object, **options: object) -> object:
        if path == "/collective_rpc" and kills:
            left.append(Left.of(engine))
            kills.pop()(engine)
        return call(server, method, path, *arguments, **options)

    def train_step(trainer: Trainer) -> dict[str, float]:
        metrics = step(trainer)
        assert metrics["engine/restarts"] == 2
        trainer.engine.update_weights(1)
        assert_answers_are_the_policys(trainer.engine, trainer.policy)
        left.append(Left.of(engine))
        raise KeyError("out of the blue")

    monkeypatch.setattr(Server, "call", killed_twice)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(KeyError, match="out of the blue"):
        trainer.train()
    assert len(left) == 3
    assert all(each.nothing() for each in left)
    assert set(Path("/dev/shm").iterdir()) <= shared_before


def test_weights_by_broadcast_and_a_server_killed_between_two_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check's prompt is as short as the server's model wants it."""
    options = {**OPTIONS, "max_model_len": 100}
    model = save_model(tmp_path / "model", tied=True)
    trainer = Trainer(vllm_config(tmp_path / "run", model, transfer="broadcast", options=options))
    engine = engine_of(trainer)
    send, sent = broadcast._broadcast, itertools.count()

    def killed_once(group: Any, weight: torch.Tensor) -> None:
        if next(sent) == 3:
            kill_worker(engine)
        send(group, weight)

    monkeypatch.setattr(broadcast, "_broadcast", killed_once)
    try:
        assert trainer.train_step()["engine/restarts"] == 1
        assert engine.update_weights(1)["sync/logprob_gap_max"] < 1e-4
        assert_answers_are_the_policys(engine, trainer.policy)
        assert engine._restarts == 1
        left = Left.of(engine)
    finally:
        trainer.engine.close()
    assert left.nothing()


def test_adapters_alone_are_sent(tmp_path: Path) -> None:
    adapters = ("q_proj", "o_proj", "down_proj")
    model = save_model(tmp_path / "model", tied=True)
    trainer = Trainer(vllm_config(tmp_path / "run", model, adapters=adapters, transfer="adapters"))
    engine = engine_of(trainer)
    try:
        trainer.train_step()
        written = engine._handover.folder / "model.safetensors"
        before = written.stat()
        assert engine.update_weights(1)["sync/logprob_gap_max"] < 1e-4
        assert_answers_are_the_policys(engine, trainer.policy)
        kill_worker(engine)
        assert_answers_are_the_policys(engine, trainer.policy)
        assert engine._restarts == 1
        assert written.stat() == before
    finally:
        trainer.engine.close()


def test_rollouts_beside_the_training_of_two_processes(tmp_path: Path) -> None:
    """Their slices become the server's weights between two steps; everything else of a rollout goes on beside a step."""
    settings = ("rollout.engine=vllm", "rollout.vllm.kv_cache_gib=1", "rollout.max_staleness=1")
    every = ("trainer.steps=4", "evaluation.every=2", "checkpoint.every=3")
    torchrun(2, "tbrm", "train", TINY, f"run.dir={tmp_path}", *settings, *every)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["staleness_mean"], row["staleness_max"]) for row in rows] == [(0, 0), (1, 1), (1, 1), (1, 1)]
    assert {(row["trajectories"], row["dropped"]) for row in rows} == {(128, 0)}
    assert all(row["sync/logprob_gap_max"] < 1e-4 and row["seconds_beside/rollout"] > 0 for row in rows)
    # Of the rollouts for steps 1 and 2, which are made by the same weights; and of none for a fifth step.
    assert [row.get("seconds/sync", 0) > 0 for row in rows] == [True, True, True, False]


def test_nothing_outlives_a_trainer_that_is_killed(tmp_path: Path) -> None:
    config = vllm_config(tmp_path / "run", save_model(tmp_path / "model", tied=True))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**config_to_dict(config), "trainer": {"steps": 100_000}}))
    process = subprocess.Popen(
        [sys.executable, "-m", "tbrm", "train", recipe], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: process.poll() is None and metrics.exists() and read_jsonl(metrics))
    [(guard, _)] = guards_of(process.pid, "server")
    [(_, command)] = guards_of(process.pid, "folder")
    left = Left(guard, *map(Path, command[-2:]))
    process.kill()
    process.wait()
    wait_until(left.nothing, 30)


@pytest.mark.skipif("SOAK_VLLM" not in os.environ, reason="some minutes: make soak-vllm")
def test_soak_a_server_killed_5_times_in_200_steps(tmp_path: Path) -> None:
    """Another of its processes each time."""
    shared_before = set(Path("/dev/shm").iterdir())
    steps, kills = (
        200,
        {20: "VLLM::Worker", 60: "api_server", 100: "VLLM::EngineCore", 140: "guard.py", 180: "VLLM::Worker"},
    )
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "tbrm",
        "train",
        str(TINY),
        f"run.dir={run}",
        f"trainer.steps={steps}",
    ]
    process = subprocess.Popen(
        [*command, "rollout.engine=vllm", "rollout.vllm.kv_cache_gib=1", "evaluation.every=0"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def steps_done() -> int:
        assert process.poll() in (None, 0)
        return len(read_jsonl(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0

    left = []
    for step, victim in kills.items():
        wait_until(lambda step=step: steps_done() >= step, 600)
        [(guard, _)] = guards_of(process.pid, "server")
        [(_, command)] = guards_of(process.pid, "folder")
        left.append(Left(guard, *map(Path, command[-2:])))
        # The guard's command has its server's in it.
        names = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in left[-1].processes()}
        [found] = [
            pid for pid, name in names.items() if victim in name and ("guard.py" in name) == (victim == "guard.py")
        ]
        os.kill(found, signal.SIGKILL)
    assert process.wait(600) == 0
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert {(row["trajectories"], row["dropped"], row["staleness_mean"]) for row in rows} == {(128, 0, 0)}
    assert rows[-1]["engine/restarts"] == len(kills)
    config = load_config(TINY)
    problems = ProblemStream(config.task, config.seed, config.task.heldout(config.evaluation.prompts))
    problems.take(config.rollout.prompts * steps)
    assert Checkpoint((run / "checkpoints" / "latest").resolve()).state.position == problems.position
    assert all(each.nothing() for each in left)
    assert set(Path("/dev/shm").iterdir()) <= shared_before


def test_a_server_that_does_not_come_up_shows_its_own_error(tmp_path: Path) -> None:
    config = vllm_config(tmp_path / "run", save_model(tmp_path / "model", tied=True), options={"max_model_len": 10**9})
    trainer = Trainer(config)
    with pytest.raises(ServerError, match=r"(?s)vllm-0.log ends with:.*max_model_len"):
        trainer.train()
