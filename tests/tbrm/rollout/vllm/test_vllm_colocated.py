"""vLLM in the trainer's process; each in a process of its own, which it will have to itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")


@pytest.mark.parametrize("head", ["tied", "adapted"])
def test_after_a_training_step_vllm_in_the_process_is_the_new_model(tmp_path: Path, head: str) -> None:
    command = [sys.executable, "-m", "tests.tbrm.rollout.vllm.colocated", str(tmp_path), head]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Failed" not in done.stderr + done.stdout  # a sync that is all right does not look like one that is not
