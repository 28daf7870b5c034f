"""Checkpoints: a Hugging Face folder that also holds the trainer's state, so that `--resume` goes on exactly.

``checkpoints/step-000010/`` holds the model and tokenizer, and in ``trainer/`` the optimiser (safetensors), the counters
(JSON), the replay buffer (JSON lines) and, once it was reset, the reference. ``latest`` and ``best`` are links. A folder
is written under another name and renamed when complete, so a kill never leaves half a checkpoint under a good name.
Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from tbrm.data import ReferenceScore, Trajectory
from tbrm.model import PolicyModel
from tbrm.reference_model import ReferenceModel

FORMAT = 1
_UNFINISHED = ".writing-"


@dataclass
class TrainerState:
    """The counters of a run. All randomness is derived from the seed and these."""

    step: int = 0
    position: int = 0
    """Of the source of trajectories."""
    reference_version: int = 0
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    best_accuracy: float | None = None
    seconds_training: float = 0.0


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "checkpoints"

    def latest(self) -> Path | None:
        link = self.folder / "latest"
        return link.resolve() if link.exists() else None

    def save(
        self,
        state: TrainerState,
        policy: PolicyModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        reference: ReferenceModel,
        replay: Iterable[Trajectory],
        *,
        best: bool,
    ) -> Path:
        name = f"step-{state.step:06d}"
        writing = self.folder / f"{_UNFINISHED}{name}"
        shutil.rmtree(writing, ignore_errors=True)
        (writing / "trainer").mkdir(parents=True)
        policy.save(writing, tokenizer)
        save_file(_optimizer_tensors(policy, optimizer), writing / "trainer" / "optimizer.safetensors")
        if reference.version > 0:
            reference.model.save(writing / "trainer" / "reference", tokenizer)
        with (writing / "trainer" / "replay.jsonl").open("w") as file:
            file.writelines(json.dumps(_to_row(trajectory)) + "\n" for trajectory in replay)
        (writing / "trainer" / "state.json").write_text(
            json.dumps({"format": FORMAT, **asdict(state)}, indent=2) + "\n"
        )

        final = self.folder / name
        if final.exists():  # the same step, saved before a resume
            shutil.rmtree(final)
        writing.rename(final)
        self._link("latest", name)
        if best:
            self._link("best", name)
        self._delete_unlinked()
        return final

    def _link(self, link: str, target: str) -> None:
        temporary = self.folder / f".{link}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, self.folder / link)

    def _delete_unlinked(self) -> None:
        linked = {(self.folder / link).resolve().name for link in ("latest", "best")}
        for folder in [*self.folder.glob("step-*"), *self.folder.glob(f"{_UNFINISHED}*")]:
            if folder.name not in linked:
                shutil.rmtree(folder)


def load_state(checkpoint: Path) -> TrainerState:
    path = checkpoint / "trainer" / "state.json"
    try:
        values = json.loads(path.read_text())
        found = values.pop("format")
        if found != FORMAT:
            raise ValueError(f"format {found!r}, this version reads {FORMAT}")
        return TrainerState(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"checkpoint {checkpoint} cannot be resumed: {path.name}: {error}. Name another by pointing "
            f"{checkpoint.parent / 'latest'} at it, or train again with --overwrite"
        ) from error


def load_optimizer(checkpoint: Path, policy: PolicyModel, optimizer: torch.optim.Optimizer) -> None:
    tensors = load_file(checkpoint / "trainer" / "optimizer.safetensors")
    for name, parameter in policy.named_parameters():
        prefix = f"{name}/"
        state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        # AdamW keeps `step` on the CPU unless it is fused on a GPU; load_state_dict would cast it, so it is set directly.
        optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in state.items()}


def load_replay(checkpoint: Path) -> list[Trajectory]:
    lines = (checkpoint / "trainer" / "replay.jsonl").read_text().splitlines()
    return [_from_row(json.loads(line)) for line in lines]


def _optimizer_tensors(policy: PolicyModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in policy.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _to_row(trajectory: Trajectory) -> dict[str, object]:
    # float32 survives the way through JSON's decimal numbers bit for bit.
    row = dict(vars(trajectory))
    if (score := trajectory.reference) is not None:
        row["reference"] = {"version": score.version, "logprobs": score.logprobs.tolist(), "value": score.value.item()}
    return row


def _from_row(row: dict[str, object]) -> Trajectory:
    score = row.pop("reference")
    trajectory = Trajectory(**row)  # type: ignore[arg-type]
    if isinstance(score, dict):
        trajectory.reference = ReferenceScore(
            score["version"], torch.tensor(score["logprobs"], dtype=torch.float32), torch.tensor(score["value"])
        )
    return trajectory
