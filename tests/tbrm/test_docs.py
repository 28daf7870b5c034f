"""What the documentation shows runs as shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tbrm.policy.tiny import tiny_model, tiny_tokenizer
from tbrm.reporting.metrics import read_jsonl
from tests.tbrm.conftest import RECIPES, VOCABULARY, make_lm

DOCS = Path(__file__).parents[2] / "docs"


def test_the_kernels_with_a_plain_hugging_face_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the model, of which there is no hub here."""
    model = make_lm("llama", tied=True).to(torch.bfloat16)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    example = re.findall(r"```python\n(.*?)```", (DOCS / "kernels.md").read_text(), re.DOTALL)[0]
    names = {"ids": torch.arange(3, 15)[None] % VOCABULARY, "prompt_length": 5}
    exec(example, names)
    out = names["out"]
    torch.testing.assert_close(out.residuals, out.values - 1 / 0.002, rtol=1e-5, atol=0)  # type: ignore[attr-defined]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_what_python_code_may_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of docs/python.md, in a folder of its own; the model again is one that is made here."""
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _: tiny_model(len(tokenizer), seed=3))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: tokenizer)
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(RECIPES)
    names: dict[str, Any] = {"__name__": "__main__"}
    for example in re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL):
        exec(example, names)
    steps = {run.name: len(read_jsonl(run / "metrics.jsonl")) for run in Path("runs").iterdir()}
    assert steps == {"first": 2, "doubling": 2, "sums": 2, "object": 2, "thread": steps["thread"]}
    assert 1 <= steps["thread"] < 1000
    assert json.loads(Path("runs/thread/result.json").read_text())["steps"] == steps["thread"]
    assert "runs/sums holds the run" in capfd.readouterr().out
