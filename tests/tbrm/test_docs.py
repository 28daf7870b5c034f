"""What the documentation shows runs as shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tbrm.conftest import VOCABULARY, make_lm

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
