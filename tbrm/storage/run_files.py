"""What a run leaves in its folder."""

from __future__ import annotations

HISTORY = "config-history.jsonl"
"""Beside config.yaml: a line for every resume with another recipe."""

RUN_FILES = (
    "config.yaml",
    HISTORY,
    "metrics.jsonl",
    "eval.jsonl",
    "result.json",
    "report.html",
    "wandb_id.txt",
    "samples",
    "tensorboard",
    "checkpoints",
    "engine",
    "replay",
)
