"""Which devices and folders the servers that we start are given. No vLLM runs."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tbrm.config.section import ConfigError
from tbrm.config.vllm import VllmConfig
from tbrm.rollout.vllm import devices, process
from tbrm.rollout.vllm.connection import ServerError
from tbrm.training.trainer import Trainer
from tests.tbrm.conftest import tiny_config


@pytest.mark.parametrize(
    ("settings", "taken", "dealt"),
    [
        ({"servers": 2}, ["4"], [["5"], ["6"]]),  # those that training leaves
        ({"servers": 2}, ["4", "5"], [["6"], ["GPU-7f"]]),
        ({"servers": 2, "options": {"tensor_parallel_size": 2}}, ["4", "5"], [["6", "GPU-7f"], ["4", "5"]]),
        (
            {"servers": 1, "options": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}},
            ["4"],
            [["5", "6", "GPU-7f", "4"]],
        ),
        ({"servers": 3}, ["4", "5", "6", "GPU-7f"], [["4"], ["5"], ["6"]]),  # there are no others
        ({"servers": 3, "devices": [0, 3]}, ["4"], [["4"], ["GPU-7f"], ["4"]]),
    ],
)
def test_servers_are_dealt_the_gpus_that_are_visible(
    settings: dict[str, Any], taken: list[str], dealt: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,GPU-7f")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = devices.places(VllmConfig(**settings), torch.device("cuda"), taken)
    assert found == [{"CUDA_VISIBLE_DEVICES": ",".join(gpus)} for gpus in dealt]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert (devices.gpu_of(torch.device("cuda")), devices.gpu_of(torch.device("cuda:3"))) == ("5", "GPU-7f")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": [4]}, "rollout.vllm.devices: 4, but CUDA_VISIBLE_DEVICES has 4 GPUs"),
        ({"options": {"tensor_parallel_size": 8}}, "tensor_parallel_size ask for 8 GPUs a server, and there are 4"),
    ],
)
def test_more_gpus_than_there_are_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        devices.deal_gpus(VllmConfig(**settings), ["0", "1", "2", "3"], ["0"])


def test_servers_on_a_cpu_are_dealt_its_cores() -> None:
    assert devices.deal_cores(VllmConfig(servers=2), range(5)) == ["0,1", "2,3,4"]
    assert devices.deal_cores(VllmConfig(servers=3), [0, 1]) == ["0", "1", "0"]
    halves = VllmConfig(servers=2, devices=[0, 1, 4, 5], options={"tensor_parallel_size": 2})
    assert devices.deal_cores(halves, range(8)) == ["0|1", "4|5"]
    assert devices.places(VllmConfig(servers=1), torch.device("cpu"), []) == [{}]  # vLLM's own choice


STAND_IN = """
import json, os
print("ENVIRONMENT", json.dumps(dict(os.environ)), flush=True)
"""


def said(log: Path) -> dict[str, str]:
    deadline = time.monotonic() + 30
    while "}" not in (text := log.read_text().partition("ENVIRONMENT ")[2]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    environment: dict[str, str] = json.loads(text.splitlines()[0])
    return environment


def test_the_environment_of_each_server_that_we_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cores, its sockets' folder, and no key, whatever the weights' folder and our own environment are."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    stand_in = tmp_path / "stand-in" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    stand_in.parent.mkdir(parents=True)
    for folder in list(stand_in.parents)[:3]:
        (folder / "__init__.py").touch()
    stand_in.write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"))
    monkeypatch.setenv("VLLM_API_KEY", "for servers of others")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 80)))
    far = tmp_path / ("y" * 100)
    for folder in (Path(tempfile.tempdir), far):
        folder.mkdir()
    settings = {"servers": 2, "weights_dir": str(far)}
    config = tiny_config(tmp_path / "run", rollout__engine="vllm", rollout__vllm=settings, evaluation={"prompts": 0})
    engine = Trainer(config).engine.engine
    try:
        with pytest.raises(ServerError, match="the server ended with exit code 0"):
            engine.update_weights(0)
        environments = [said(tmp_path / "run" / "engine" / f"vllm-{number}.log") for number in range(2)]
    finally:
        engine.close()
    assert len({each["VLLM_CPU_OMP_THREADS_BIND"] for each in environments}) == min(2, len(devices._cores()))
    for each in environments:
        assert not each["VLLM_API_KEY"]
        assert len(each["TMPDIR"]) <= process._LONGEST_PARENT + 14
        assert not Path(each["TMPDIR"]).exists()
    assert not list(far.iterdir())
