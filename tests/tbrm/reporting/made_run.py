"""A run's folder as training leaves it, made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tbrm.reporting.metrics import MetricsLog

ATTACK = "<script>fetch('https://evil.example')</script><img src=https://evil.example onerror=alert(1)>"
CONFIG = {
    "run": {"dir": "runs/x"},
    "seed": 3,
    "model": {"name": "models/small"},
    "task": {"name": "reasoning_gym", "family": "chain_sum"},
    "objective": {"name": "tbrm", "beta": 0.002},
    "trainer": {"steps": 4},
}


def metrics_of(step: int, **changed: float) -> dict[str, float]:
    metrics = {
        "trajectories": 16,
        "fresh_share": 0.75,
        "dropped": 4,
        "loss": 900.0 / step,
        "reward_mean": 0.1 * step,
        "residual_mean": 20.0 - step,
        "residual_std": 5.0,
        "value_mean": 34.0 + step,
        "log_ratio_mean": 0.1 * step,
        "entropy_mean": 1.0 / step,
        "response_length_mean": 9.0,
        "truncated_share": 0.25,
        "behaviour_gap_mean": 0.01 * step,
        "behaviour_kl": 0.001 * step,
        "clip_fraction": 0.05,
        "learned_value_explains": 1 - 1 / step,
        "ungraded": 2,
        "grad_norm": 3.0,
        "learning_rate": 1e-5,
        "seconds/rollout": 40.0,
        "seconds/update": 60.0,
        "generated_responses": 20,
        "generated_tokens": 1000 * step,
        "trained_tokens": 3000,
        "tokens_per_second": 100.0 * step,
        "peak_memory_mib": 2000.0 + step,
    }
    return metrics | changed


def sample(index: int, correct: bool, response: str = "So it is 7.", truncated: bool = False) -> dict[str, Any]:
    return {
        "prompt": f"Prompt number {index}",
        "response": response,
        "answer": f"answer {index}",
        "reward": float(correct),
        "correct": correct,
        "truncated": truncated,
    }


def write_samples(run_dir: Path, step: int, rows: Sequence[dict[str, Any]]) -> None:
    path = run_dir / "samples" / f"step-{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(run_dir: Path, steps: int = 4, *, after: float = 0.55, **config: Any) -> Path:
    """A whole run: 4 of 20 held-out prompts right before it, 11 after (8 fixed, 1 broken, 3 stayed right). `after` is what its
    evaluation says, and `config` replaces sections of CONFIG."""
    with MetricsLog(run_dir) as log:
        log.log_eval(0, {"accuracy": 0.2, "ci_low": 0.081, "ci_high": 0.416, "n": 20, "reward_mean": 0.3125})
        for step in range(1, steps + 1):
            log.log(step, metrics_of(step))
        log.log_eval(steps, {"accuracy": after, "ci_low": 0.342, "ci_high": 0.742, "n": 20, "reward_mean": 0.75})
    write_samples(run_dir, 0, [sample(i, correct=i < 4, truncated=i == 5) for i in range(20)])
    write_samples(run_dir, steps, [sample(i, correct=0 < i < 12, response=ATTACK) for i in range(20)])
    (run_dir / "config.yaml").write_text(yaml.safe_dump(CONFIG | config, sort_keys=False))
    result = {
        "accuracy_before": 0.2,
        "accuracy_after": 0.55,
        "n_heldout": 20,
        "seconds_training": 493.2,
        "steps": steps,
    }
    (run_dir / "result.json").write_text(json.dumps(result | {"seed": 3, "objective": "tbrm", "model": "models/small"}))
    return run_dir
