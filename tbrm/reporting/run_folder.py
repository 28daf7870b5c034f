"""Reads what a run left in its folder. A run that is still going, or was killed, is read as far as it goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tbrm.reporting.metrics import read_jsonl
from tbrm.storage.run_files import HISTORY

Row = dict[str, Any]
SamplePair = tuple[Row, Row | None]


@dataclass(frozen=True)
class Run:
    """What is missing is empty, and `gaps` says so in words."""

    config: Row
    """The resolved config, as nested sections: what the run was last started with."""
    changes: list[Row]
    """What of it was otherwise before, a row for each resume that changed something."""
    metrics: list[Row]
    evals: list[Row]
    result: Row
    samples: list[SamplePair]
    """The first response to each held-out prompt at the first evaluation and at the last; None: not there yet."""
    sample_steps: list[int]
    """The steps of those evaluations."""
    gaps: list[str]

    def setting(self, key: str) -> Any:
        """The config's value at a dotted key; None if it has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_run(run_dir: Path) -> Run:
    """Raises ValueError if there is nothing of a run in `run_dir`."""
    gaps: list[str] = []

    def read(name: str, parse: Callable[[Path], Any], empty: Any, if_missing: str) -> Any:
        path = run_dir / name
        try:
            content = parse(path) if path.exists() else empty
        except (ValueError, yaml.YAMLError) as error:
            gaps.append(f"{name} cannot be read: {error}")
            return empty
        if not content:
            gaps.append(f"{name} {'is empty' if path.exists() else 'is missing'}: {if_missing}.")
        return content or empty

    config = read("config.yaml", _read_yaml, {}, "the settings of the run are not known")
    changes = read(HISTORY, read_jsonl, [], "") if (run_dir / HISTORY).exists() else []
    metrics = read("metrics.jsonl", read_jsonl, [], "no step is finished yet")
    evals = read("eval.jsonl", read_jsonl, [], "the model has not been evaluated yet")
    files = sorted((run_dir / "samples").glob("step-*.jsonl"))
    if not files:
        gaps.append("samples are missing: no responses to held-out prompts have been written yet.")
    ends = files[:1] + files[1:][-1:]
    responses = [read(f"samples/{file.name}", read_jsonl, [], "no response is written yet") for file in ends]
    result = read("result.json", _read_json, {}, "the run is still going, or was stopped before its end")
    if not (config or metrics or evals or responses or result):
        raise ValueError(f"{run_dir} holds nothing of a run: {' '.join(gaps)}")
    before, after = ([_first_of_each_prompt(rows) for rows in responses] + [{}, {}])[:2]
    return Run(
        config=config,
        changes=changes,
        metrics=metrics,
        evals=evals,
        result=result,
        samples=[(row, after.get(prompt)) for prompt, row in before.items()],
        sample_steps=[int(file.stem.removeprefix("step-")) for file in ends],
        gaps=gaps,
    )


def _first_of_each_prompt(rows: list[Row]) -> dict[str, Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["prompt"], row)
    return first


def _read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
