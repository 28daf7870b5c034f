"""Real processes (torchrun, gloo) against one: the same losses, the same gradients, the same runs."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tbrm.tiny import tiny_tokenizer
from tests.tbrm.conftest import ARCHITECTURES
from tests.tbrm.processes import MICRO_BATCHES, MODELS

COUNTS = (2, 4)


def torchrun(processes: int, *command: str | Path, check: bool = True, options: tuple[str, ...] = (), **more: Any):
    """`python -m COMMAND` in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    done = subprocess.run(
        [*launcher, "-m", *map(str, command)], env=environment, capture_output=True, text=True, timeout=240, **more
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def write_models(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    for name in MODELS:
        architecture, head = name.split("-")
        config = copy.deepcopy(ARCHITECTURES[architecture])
        config.vocab_size = len(tokenizer)  # 101: no number of processes divides it
        config.tie_word_embeddings = head == "tied"
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config)
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        lm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_trajectories(folder: Path) -> None:
    """Uneven lengths, shared prompts, one response longer than a micro-batch."""
    rng = random.Random(0)
    rows = []
    for problem in range(8):
        prompt = [1, 2] + [rng.randrange(3, 97) for _ in range(rng.randrange(1, 12))]
        for sample in range(4):
            length = 140 if (problem, sample) == (3, 2) else rng.randrange(1, 30)
            response = [rng.randrange(3, 97) for _ in range(length)]
            rows.append({"prompt_ids": prompt, "response_ids": response, "reward": rng.random()})
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What `processes.py` found, by number of processes."""
    folder = tmp_path_factory.mktemp("steps")
    write_models(folder)
    write_trajectories(folder)
    subprocess.run([sys.executable, "-m", "tests.tbrm.processes", str(folder)], check=True, timeout=240)
    for count in COUNTS:
        torchrun(count, "tests.tbrm.processes", folder)
    return {count: torch.load(folder / f"{count}.pt") for count in (1, *COUNTS)}


def assert_same_step(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-4) -> None:
    for key in ("loss", "residual_mean", "value_mean", "entropy_mean", "grad_norm"):
        assert ours["metrics"][key] == pytest.approx(theirs["metrics"][key], rel=tolerance, abs=1e-5), key
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, gradient in ours["gradients"].items():
        expected = theirs["gradients"][name]
        assert (gradient - expected).norm() <= tolerance * expected.norm() + 1e-6, name


@pytest.mark.parametrize("processes", COUNTS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
def test_loss_and_gradients_do_not_depend_on_processes_or_micro_batches(
    steps: dict[int, dict[str, Any]], model: str, micro_batches: int, processes: int
) -> None:
    whole = steps[1][f"{model}, 1 micro-batches"]
    assert whole["metrics"]["loss"] > 0
    for count in (1, processes):
        step = steps[count][f"{model}, {micro_batches} micro-batches"]
        assert_same_step(step, whole)
        assert step["largest_log_ratio"] == 0.0  # of every trajectory, exactly


@pytest.mark.parametrize("processes", (1, *COUNTS))
@pytest.mark.parametrize(
    "setting", ["shard in pairs", "reduce every micro-batch", "keep gathered", "checkpointed activations"]
)
def test_no_key_of_parallel_changes_the_step(
    steps: dict[int, dict[str, Any]], setting: str, processes: int
) -> None:
    whole = steps[1]["qwen3-tied, 1 micro-batches"]
    assert_same_step(steps[processes][setting], whole)
    assert_same_step(steps[processes][f"{setting}, once more"], whole)


@pytest.mark.parametrize("processes", COUNTS)
@pytest.mark.parametrize("batch", ["one trajectory", "all but one masked", "all masked"])
def test_a_process_with_nothing_to_do_adds_nothing_and_hangs_nobody(
    steps: dict[int, dict[str, Any]], batch: str, processes: int
) -> None:
    assert_same_step(steps[processes][batch], steps[1][batch])
    if batch == "all but one masked":
        assert_same_step(steps[processes][batch], steps[1]["one trajectory"])
    if batch == "all masked":
        assert steps[processes][batch]["metrics"]["loss"] == 0.0


@pytest.mark.parametrize("processes", COUNTS)
def test_bfloat16_stays_near_that_of_one_process(steps: dict[int, dict[str, Any]], processes: int) -> None:
    step = steps[processes]["bfloat16"]
    assert_same_step(step, steps[1]["bfloat16"], tolerance=0.03)
    assert step["largest_log_ratio"] == 0.0
    assert all(gradient.dtype is torch.float32 for gradient in step["gradients"].values())


@pytest.mark.parametrize("processes", COUNTS)
def test_the_heads_weight_is_gathered_once_a_pass_whatever_the_chunks(
    steps: dict[int, dict[str, Any]], processes: int
) -> None:
    found = steps[processes]["gathers"]
    assert found["chunks"] > 5
    assert found["head"] == 2  # once for the reference, once for the policy's forward and backward
    assert found["blocks"] == 3 * found["n_blocks"]  # forward of both, backward of the policy
