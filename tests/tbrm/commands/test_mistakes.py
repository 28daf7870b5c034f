"""What is wrong is said before torch is loaded, in one process that is asked everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tbrm.conftest import RECIPES

CODE = """
import json, sys
from tbrm.commands.cli import main

for arguments in json.load(sys.stdin):
    assert main(arguments) == 1, arguments
    loaded = {"torch", "transformers"} & sys.modules.keys()
    assert not loaded, (arguments, loaded)
    print("----", file=sys.stderr)
"""

OWN = {
    "run": {"dir": "run"},
    "model": {"name": "tiny"},
    "task": {"name": "file", "path": "rows.jsonl", "verifier": "last_number"},
    "objective": {"name": "tbrm", "beta": 0.1},
    "trainer": {"steps": 1},
}

MISTAKES = {
    "train nowhere.yaml": "recipe 'nowhere.yaml' cannot be read: No such file",
    "config broken.yaml": "recipe 'broken.yaml' is not YAML",
    "config own.yaml optim.lr=1": "optim.lr: unknown key (value 1); did you mean optim.learning_rate?",
    "train own.yaml trainer.steps=0": "trainer.steps: got 0 (int); wants",
    "train own.yaml task.path=none.jsonl": "none.jsonl: no such file",
    "train own.yaml task.verifier=exactt": "no verifier is called 'exactt': did you mean 'exact'?",
    "train own.yaml evaluation.prompts=5": "evaluation wants 5 distinct held-out prompts",
    "config own.yaml evaluation.prompts=5": "evaluation wants 5 distinct held-out prompts",
    "train own.yaml model.name=runs/none": "model.name: 'runs/none' is not there",
    "config own.yaml model.name=runs/none": "model.name: 'runs/none' is not there",
    "plan own.yaml model.name=./none": "model.name: './none' is not there",
    "rollout own.yaml --out x.jsonl model.name=./none": "model.name: './none' is not there",
    "eval runs/none --task own.yaml --prompts 1 task.heldout_rows=1": "model.name: 'runs/none' is not there",
    "eval tiny --task own.yaml": "evaluation.prompts: 0, or the task holds no problems out",
    "score runs/none rows.jsonl": "model.name: 'runs/none' is not there",
    "train own.yaml model.name=owner/name": "model.name: 'owner/name' is no folder here, so a hub's",
    "score owner/name rows.jsonl": "model.name: 'owner/name' is no folder here, so a hub's",
    "train own.yaml data.trajectories=none.jsonl": "data.trajectories: 'none.jsonl' is not there",
    "train own.yaml run.dir=full": "run.dir: 'full' holds a run already; give --resume",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN))
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_mistakes_are_answered_before_anything_heavy_is_loaded(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=folder,
        input=json.dumps([mistake.split() for mistake in MISTAKES]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for (mistake, said), answer in zip(MISTAKES.items(), done.stderr.split("----\n"), strict=False):
        assert f"tbrm {mistake.split()[0]}: " in answer, (mistake, answer)
        assert said in answer and "Traceback" not in answer, (mistake, answer)
    assert "evaluation.prompts" in done.stdout  # `tbrm config` shows the keys of what would be refused all the same


def test_a_good_recipe_of_ours_is_refused_nothing(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tbrm", "config", RECIPES / "tiny.yaml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
