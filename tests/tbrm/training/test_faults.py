"""What can go wrong from outside: signals, kills, full disks, damaged files, processes that hang."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from tbrm.reporting.metrics import read_jsonl
from tbrm.training.checkpoint import Checkpoint, CheckpointError
from tbrm.training.checkpoints import Checkpoints
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config, tiny_tree
from tests.tbrm.started import torchrun
from tests.tbrm.test_parallel import assert_same_weights, rows

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TRAIN = [sys.executable, "-m", "tbrm", "train"]


def write_recipe(folder: Path, run: str = "run", **settings: object) -> Path:
    recipe = folder / f"{run}.yaml"
    recipe.write_text(
        yaml.safe_dump(tiny_tree(folder / run, evaluation={"prompts": 0}, task={"name": "echo"}, **settings))
    )
    return recipe


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(1800):
        if (run / "metrics.jsonl").exists() and len(read_jsonl(run / "metrics.jsonl")) >= step:
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError(f"{run} never came to step {step}")


def children(pid: int) -> list[int]:
    """The processes that a launcher has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_leaves_with_a_clear_line(tmp_path: Path, number: int, processes: int) -> None:
    recipe = write_recipe(tmp_path, trainer__steps=100_000)
    run = tmp_path / "run"
    launcher = (
        [] if processes == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    )
    command = [sys.executable, "-m", *launcher, "tbrm", "train", str(recipe)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, 3, process)
    # To all of them at once, as SLURM and systemd do: the workers get it from torchrun once more.
    for pid in [process.pid, *(children(process.pid) if processes > 1 else [])]:
        os.kill(pid, number)
    _, errors = process.communicate(timeout=60)
    last = read_jsonl(run / "metrics.jsonl")[-1]["step"]
    line = f"tbrm train: {signal.Signals(number).name}: stopped after step {last}, which is saved; go on with --resume"
    assert line in errors, errors
    said = re.findall(r"SIG\w+: the (?:step|evaluation) under way is finished and a checkpoint written", errors)
    assert len(said) == 1, errors  # at once, and by one of the processes
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{last:06d}"
    assert Checkpoint((run / "checkpoints" / "latest").resolve()).state.step == last
    if processes == 1:
        assert process.returncode == 128 + number


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, checkpoint__every=1)

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # less than the model's weights

    done = subprocess.run(
        [*TRAIN, recipe], env=ENVIRONMENT, preexec_fn=little_room, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "tbrm train: checkpoint step-000001 cannot be written" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_a_run_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = write_recipe(tmp_path)
    done = subprocess.run(
        [*TRAIN, recipe, f"run.dir={tmp_path / 'file' / 'run'}"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("cannot be written to: Not a directory")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(tmp_path: Path) -> None:
    settings = {"evaluation": {"prompts": 0}, "checkpoint": {"every": 1, "keep": 2}}
    Trainer(tiny_config(tmp_path / "run", trainer__steps=4, **settings)).train()
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000003", "step-000004"]
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole, symlinks=True)

    weights = folder / "step-000004" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-000004 cannot be resumed: model.safetensors is damaged") as error:
        Trainer(tiny_config(tmp_path / "run", trainer__steps=4, **settings), resume=True)
    command = str(error.value).split("`")[1]
    subprocess.run(command, shell=True, check=True)
    Trainer(tiny_config(tmp_path / "run", trainer__steps=4, **settings), resume=True).train()
    assert_same_weights(tmp_path / "run", whole)

    (folder / "step-000003" / "trainer" / "replay" / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"replay/index\.json is missing\. There is no good one before it"):
        Checkpoint(folder / "step-000003")  # step 4 is a good one, but not before it

    manifest = folder / "step-000004" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"config.json"', '"../../config.yaml"'))
    with pytest.raises(CheckpointError, match=r"step-000004 cannot be resumed: '\.\.' is no plain name of a file"):
        Checkpoint(folder / "step-000004")


def test_of_two_damaged_checkpoints_neither_is_offered(tmp_path: Path) -> None:
    settings = {"evaluation": {"prompts": 0}, "checkpoint": {"every": 1, "keep": 4}}
    Trainer(tiny_config(tmp_path, trainer__steps=3, **settings)).train()
    folder = tmp_path / "checkpoints"
    for step in (2, 3):
        (folder / f"step-{step:06d}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"`ln -sfn step-000001 "):
        Checkpoint(folder / "step-000003")


def test_checkpoints_written_while_training_goes_on_are_the_same(tmp_path: Path) -> None:
    for asynchronous in (False, True):
        checkpoint = {"every": 1, "asynchronous": asynchronous}
        Trainer(tiny_config(tmp_path / str(asynchronous), checkpoint=checkpoint)).train()
    assert_same_weights(tmp_path / "True", tmp_path / "False")
    assert Checkpoint((tmp_path / "True" / "checkpoints" / "latest").resolve()).state.step == 4


def test_a_signals_checkpoint_that_cannot_be_written_is_not_called_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def train_step(self: Trainer) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    real = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(Checkpoints, "_write_tensors", full)
    trainer = Trainer(tiny_config(tmp_path, evaluation={"prompts": 0}, checkpoint={"asynchronous": True}))
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room there"):
        trainer.train()


HANGS = textwrap.dedent(
    """
    import os, signal, sys, time
    from tbrm.training import trainer
    from tbrm.commands.cli import main
    if os.environ["RANK"] == "1":
        real = trainer.Trainer._add_gradients
        def stop(self, *arguments):
            if self.state.step == 2:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun shall have no trouble with it
                time.sleep(10_000)
            real(self, *arguments)
        trainer.Trainer._add_gradients = stop
    sys.exit(main(sys.argv[1:]))
    """
)


def test_a_process_that_hangs_is_named(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    recipe = write_recipe(tmp_path, parallel={"timeout": 5})
    path = f"{tmp_path}:{Path.cwd()}"
    done = torchrun(2, "hangs", "train", recipe, check=False, env={"PYTHONPATH": path})
    assert done.returncode != 0
    assert "no answer from rank 1 on " in done.stderr
    assert "parallel.timeout (5 s)" in done.stderr


def test_a_run_killed_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    """torchrun restarts it, and it goes on by itself. The soak test (`make soak`) kills 20 times in 40 steps."""
    kills, steps = int(os.environ.get("SOAK_KILLS", 3)), int(os.environ.get("SOAK_STEPS", 6))
    settings = {
        "trainer__steps": steps,
        "trainer__batch_tokens": 60,
        "checkpoint": {"every": 1, "asynchronous": True},
        "objective": {"name": "reval", "beta": 0.05, "centre_rewards": True, "reset_reference_every": 3},
        "replay": {"capacity": 12, "samples_per_step": 4},
    }
    torchrun(2, "tbrm", "train", write_recipe(tmp_path, "whole", **settings), timeout=60 + 10 * steps)
    counter = tmp_path / "kills"
    torchrun(
        2,
        "tests.tbrm.training.killed",
        "train",
        write_recipe(tmp_path, "killed", **settings),
        "--resume",
        options=(f"--max-restarts={kills}", "--shutdown-timeout=5"),
        env={"KILLS": str(kills), "KILLS_SO_FAR": str(counter)},
        timeout=120 + 60 * kills,
    )
    assert counter.stat().st_size == kills
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
