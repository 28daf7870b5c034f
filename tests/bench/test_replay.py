"""The replay benchmark's figures, from the files that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.replay import Variant, plot, read_curve, table


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_tokens_and_seconds_are_counted_up_to_the_evaluation_that_reached_the_target(tmp_path: Path) -> None:
    step = {"seconds/rollout": 2.0, "seconds/wait": 1.0, "seconds/update": 3.0, "seconds_beside/rollout": 50.0}
    rows = [{"step": n, **step, "seconds/checkpoint": 100.0 * (n == 2)} for n in range(1, 5)]
    for row in rows[::2]:  # two updates a rollout
        row["generated_tokens"] = 1000
    write_lines(tmp_path / "metrics.jsonl", rows)
    evaluations = [{"step": n, "accuracy": accuracy} for n, accuracy in ((0, 0.25), (2, 0.5), (4, 0.75))]
    write_lines(tmp_path / "eval.jsonl", evaluations)

    curve = read_curve(tmp_path)
    assert (curve.tokens, curve.seconds) == ([0, 1000, 2000], [0.0, 12.0, 24.0])
    curves = {Variant("tbrm", "two updates", ()): [curve, curve]}
    ends = "| tbrm, two updates | 75.0%, 75.0% | 75.0% |"
    assert f"{ends} 2,000 | 1,000, 1,000 | 1,000 |" in table(curves, 0.5, "tokens")
    assert f"{ends} 24 | 12, 12 | 12 |" in table(curves, 0.5, "seconds")
    assert f"{ends} 2,000 | never, never | never |" in table(curves, 0.8, "tokens")
    plot(curves, 0.5, "tokens", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
