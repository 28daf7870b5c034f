"""Every architecture of the models' test, from files that transformers writes to files that it reads, on one process and on
two; and folders that do not hold the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tbrm.policy.weights import stored_tensors
from tbrm.training.export import export
from tests.tbrm.policy.architectures import MODELS, SEEING, STEPS, write_models
from tests.tbrm.policy.test_model_files import BROKEN
from tests.tbrm.started import forked
from tests.tbrm.test_parallel import rows, write_trajectories


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, and `architectures.py`'s runs of one process and of two."""
    folder = tmp_path_factory.mktemp("architectures")
    write_models(folder)
    write_trajectories(folder)
    for name, (write, _) in BROKEN.items():
        write(folder / "broken" / name)
    for count in (1, 2):
        forked(count, "tests.tbrm.policy.architectures", folder)
    return folder


def checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the last, whole, whatever number of processes wrote them."""
    return {name: tensor.read() for name, tensor in stored_tensors(run / "checkpoints" / "latest").items()}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MODELS)
def test_two_processes_train_every_architecture_as_one_does(runs: Path, architecture: str) -> None:
    alone, together = rows(runs / "1" / architecture), rows(runs / "2" / architecture)
    assert len(alone) == len(together) == STEPS
    assert alone[0]["log_ratio_mean"] == together[0]["log_ratio_mean"] == 0.0
    for ours, theirs in zip(together, alone, strict=True):
        for key in ("loss", "value_mean", "entropy_mean", "grad_norm", "log_ratio_mean"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    one, two = checkpoint(runs / "1" / architecture), checkpoint(runs / "2" / architecture)
    assert one.keys() == two.keys()
    began = AutoModelForCausalLM.from_pretrained(runs / architecture).state_dict()
    moved = torch.cat([(weight - began[name]).flatten() for name, weight in one.items()]).norm()
    apart = torch.cat([(weight - two[name]).flatten() for name, weight in one.items()]).norm()
    assert apart < 0.01 * moved  # AdamW makes a step of the rounding of a gradient that is zero


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_resumes_bit_for_bit(runs: Path, architecture: str, processes: int) -> None:
    run = runs / str(processes) / architecture
    resumed = run.with_name(f"{architecture}, resumed")
    assert rows(resumed) == rows(run)
    ours, theirs = checkpoint(resumed), checkpoint(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_tower_without_gradients_has_no_moments_and_stays_as_it_was(runs: Path, processes: int) -> None:
    run = runs / str(processes) / SEEING
    moments = stored_tensors(run / "checkpoints" / "latest" / "trainer" / "optimizer")
    assert not any("vision_tower" in name for name in moments)
    assert any("language_model" in name for name in moments)
    began = AutoModelForCausalLM.from_pretrained(runs / SEEING).state_dict()
    trained = checkpoint(run)
    assert all(torch.equal(trained[name], weight) for name, weight in began.items() if "vision_tower" in name)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("architecture", MODELS)
def test_what_is_exported_has_the_names_of_the_model_that_was_given(
    runs: Path, architecture: str, processes: int, tmp_path: Path
) -> None:
    run = runs / str(processes) / architecture
    export(str(run), tmp_path / "exported")
    given, exported = (load_file(path / "model.safetensors") for path in (runs / architecture, tmp_path / "exported"))
    assert exported.keys() == given.keys()
    lm, found = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(found.values())
    state = lm.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in checkpoint(run).items())


@pytest.mark.parametrize("folder", BROKEN)
def test_no_number_of_processes_trains_a_model_that_is_not_all_there(runs: Path, folder: str) -> None:
    said: dict[str, Any] = {count: json.loads((runs / count / "said.json").read_text())[folder] for count in ("1", "2")}
    assert BROKEN[folder][1] in said["1"][0]
    assert said["2"] == said["1"] * 2
