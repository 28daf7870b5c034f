"""The step's benchmark: what all ways are given, and its table. The command itself checks every way before it is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import step, step_ways
from bench.step_ways import MICRO_BATCH, WAYS, Padded, padded_tokens, recorded


def test_all_ways_are_given_the_same_trajectories() -> None:
    prompts = [tuple(row["prompt_ids"]) for row in recorded()]
    assert len(prompts) == 64
    assert {prompts.count(prompt) for prompt in prompts} == {4}
    assert 0 < sum(row["reward"] for row in recorded()) < 64  # else there were no advantages
    batch = Padded()
    assert batch.ids.numel() == padded_tokens()
    for row, ids, attention, targets, mask in zip(
        recorded(), batch.ids, batch.attention.bool(), batch.targets, batch.mask.bool(), strict=True
    ):
        assert ids[attention].tolist() == row["prompt_ids"] + row["response_ids"]
        assert targets[mask].tolist() == row["response_ids"]
    covered = torch.cat([torch.arange(64)[rows] for rows in batch.micro_batches()])
    assert covered.tolist() == list(range(64))
    assert len(batch.micro_batches()) == 64 // MICRO_BATCH


def test_our_way_takes_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the tiny model, and trajectories of its own vocabulary: SmolLM2 is not downloaded for a test."""
    rows = [{"prompt": f"{i} + 1", "response": str(i + 1), "reward": i % 2} for i in range(64)]
    file = tmp_path / "trajectories.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(step_ways, "TRAJECTORIES", str(file))
    monkeypatch.setattr(step_ways, "MODEL", "tiny")
    ours = step_ways.Tbrm("float32")
    before = ours.logprobs()
    assert len(before) > 64
    assert len(ours.steps()) == step_ways.ROUNDS + 1
    assert ours.logprobs() != before


def test_the_table_compares_with_ours_and_with_its_floor() -> None:
    first, *others = WAYS
    floor = {"operations": 3e12, "products": 0.75, "of_optimiser": 0.25, "seconds_of_floor": 1.0}
    measured: dict[str, dict[str, Any]] = {first: {"seconds": [2.0, 1.0, 9.0], "peak_mib": 1000.0, "gap": 0.0, **floor}}
    measured |= {way: {"seconds": [6.0], "peak_mib": 1500.0, "gap": 2e-5} for way in others}
    text = step.table(measured)
    assert f"| {first} | 2.00 | 1.00 | 2.00 | 3.00 | 0.75 | 0.25 | 1000 | 1.00 |" in text
    assert all(f"| {way} | 6.00 | 3.00 |  |  |  |  | 1500 | 1.50 |" in text for way in others)
    assert "within 2e-05" in text and "3,904 tokens" in text
