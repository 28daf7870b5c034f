"""Files of a run: who may read them, and what is done about those that cannot be deleted or written."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tbrm.reporting.metrics import read_jsonl
from tbrm.rollout.vllm.handover import Handover
from tbrm.storage import files
from tbrm.storage.files import Discards, lacks_room, save_tensors
from tbrm.training.checkpoint import CheckpointError
from tbrm.training.export import export
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import chat_of, tiny_config
from tests.tbrm.policy.test_lora import with_adapters

REPLAY = {"capacity": 20, "samples_per_step": 4}


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("strict_umask")
def test_every_file_has_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    checkpoint = {"every": 1, "keep": 2}
    run = tiny_config(tmp_path / "run", trainer__steps=2, replay=REPLAY, checkpoint=checkpoint)
    Trainer(run).train()
    export(str(tmp_path / "run"), tmp_path / "exported")
    policy = with_adapters("qwen3", "q_proj")
    handover = Handover(policy, torch.float32, chat_of(policy.lm).ends, str(tmp_path), adapters_apart=True)
    handover.write()
    adapted = tiny_config(tmp_path / "adapted", model__name=str(tmp_path / "exported"), lora__rank=2, trainer__steps=1)
    Trainer(adapted).train()
    found = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert {"adapter_model.safetensors", "index.json"} <= {path.name for path in found}
    assert len([path for path in found if path.name.endswith(".safetensors")]) > 8
    odd = {str(path): oct(path.stat().st_mode) for path in found if _mode(path) != (0o750 if path.is_dir() else 0o640)}
    assert not odd


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def read_by_somebody(name: str) -> Iterator[list[str]]:
    """Files of this name do not go when they are deleted, as NFS has it while they are open: another name stays. Gives those
    that did so."""
    kept: list[str] = []
    unlink = os.unlink

    def silly_rename(path: Any, *, dir_fd: int | None = None) -> None:
        if Path(path).name.startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        if Path(path).name != name:
            return unlink(path, dir_fd=dir_fd)
        kept.append(str(path))
        os.rename(path, f".nfs{len(kept)}", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", silly_rename)
        yield kept


def test_a_checkpoint_that_somebody_reads_stops_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def config(steps: int) -> Any:
        checkpoint = {"every": 1, "keep": 1}
        return tiny_config(tmp_path, trainer__steps=steps, checkpoint=checkpoint, evaluation={"prompts": 0})

    with read_by_somebody("generation_config.json") as kept:
        Trainer(config(4)).train()
        assert len(kept) == 3
        Trainer(config(5), resume=True).train()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 5
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.glob("step-*")] == ["step-000005"]  # no half of one under its name
    assert len(list(folder.glob(".deleted-*"))) == 4
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot be deleted" in line]
    # Once each; the second process tells anew of what it finds.
    steps = sorted(line.split(" cannot ")[0] for line in told)
    assert steps == [str(folder / f"step-{step:06d}") for step in (1, 1, 2, 2, 3, 3, 4)]
    assert all("which will be tried again: [Errno " in line for line in told)
    Trainer(config(6), resume=True).train()
    assert not list(folder.glob(".deleted-*"))  # nobody reads them any more


def test_a_file_of_the_replay_buffer_that_cannot_be_deleted_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name == "step-000001.safetensors":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    config = tiny_config(tmp_path, replay=REPLAY, rollout__prompts=10, rollout__samples=1, evaluation={"prompts": 0})
    Trainer(config).train()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 4
    assert capsys.readouterr().err.count("step-000001.safetensors cannot be deleted yet") == 1
    assert not (tmp_path / "replay").exists()  # it went with its folder


def test_what_was_left_is_deleted_with_the_next(tmp_path: Path) -> None:
    discards = Discards(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    with read_by_somebody("file"):
        discards.discard(tmp_path / "a")
    assert [path.name[:11] for path in tmp_path.iterdir() if path.name != "b"] == [".deleted-a-"]
    discards.discard(tmp_path / "b", tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room there, and"),
        (errno.EDQUOT, "make room there, and"),
        (errno.EACCES, "mend that, and"),
        (errno.EIO, "mend that, and"),
    ],
)
def test_room_is_only_spoken_of_where_it_is_the_matter(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr(files, "save_file", fail)
    config = tiny_config(tmp_path, trainer__steps=1, evaluation={"prompts": 0})
    with pytest.raises(
        CheckpointError, match=rf"{os.strerror(number)}.*: {advice} go on from the latest with --resume"
    ):
        Trainer(config).train()
    with pytest.raises(OSError, match=rf"\. {advice.capitalize()} go on with --resume"):
        Trainer(tiny_config(tmp_path / "other", replay=REPLAY, trainer__steps=1, evaluation={"prompts": 0})).train()
    assert lacks_room(OSError(number, "")) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_what_safetensors_itself_says_is_understood(tmp_path: Path) -> None:
    """By a limit on the size of files, which is no lack of room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises((SafetensorError, OSError), match=f"os error {errno.EFBIG}") as raised:
            save_tensors({"x": torch.zeros(10_000)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not lacks_room(raised.value)
