"""Reads what a run left in its folder. A run that is still going, or was killed, is read as far as it goes; of a file that
somebody else wrote, or another version, what can be read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tbrm.reporting.metrics import parsed_lines
from tbrm.storage.run_files import HISTORY

Row = dict[str, Any]
SamplePair = tuple[Row, Row | None]
Kind = type | tuple[type, ...]
"""What isinstance takes."""

_NAMED_LINES = 3
"""Of those that cannot be read."""
_NUMBER = (int, float)
_ENDLESS = 1e300
_SAMPLE: Mapping[str, Kind] = {
    "prompt": str,
    "response": str,
    "answer": str,
    "reward": _NUMBER,
    "correct": bool,
    "truncated": bool,
}
"""What a response must have to be shown, and of which type."""


@dataclass(frozen=True)
class Run:
    """What is missing is empty, and `gaps` says so in words."""

    path: Path
    config: Row
    """The resolved config, as nested sections: what the run was last started with."""
    changes: list[Row]
    """What of it was otherwise before, a row for each resume that changed something."""
    metrics: list[Row]
    """One of each step, in their order, as are `evals`."""
    evals: list[Row]
    result: Row
    samples: list[SamplePair]
    """The first response to each held-out prompt at the first evaluation and at the last; None: not there yet."""
    sample_steps: list[int]
    """The steps of those evaluations."""
    gaps: list[str]

    @property
    def name(self) -> str:
        return self.path.name

    def setting(self, key: str) -> Any:
        """The config's value at a dotted key; None if it has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_run(run_dir: Path) -> Run:
    """Raises ValueError if there is nothing of a run in `run_dir`."""
    folder = _Folder(run_dir)
    config = folder.mapping("config.yaml", "the settings of the run are not known")
    changes = folder.rows(HISTORY, {"step": int, "changed": dict}, "") if (run_dir / HISTORY).exists() else []
    metrics = folder.rows("metrics.jsonl", {"step": int}, "no step is finished yet")
    evals = folder.rows("eval.jsonl", {"step": int, "accuracy": _NUMBER}, "the model has not been evaluated yet")
    files = sorted((run_dir / "samples").glob("step-*.jsonl"))
    if not files:
        folder.gaps.append("samples are missing: no responses to held-out prompts have been written yet.")
    ends = files[:1] + files[1:][-1:]
    responses = [folder.rows(f"samples/{file.name}", _SAMPLE, "no response is written yet") for file in ends]
    result = folder.mapping("result.json", "the run is still going, or was stopped before its end")
    if not (config or metrics or evals or responses or result):
        raise ValueError(f"{run_dir} holds nothing of a run: {' '.join(folder.gaps)}")
    before, after = ([_first_of_each_prompt(rows) for rows in responses] + [{}, {}])[:2]
    return Run(
        path=run_dir.resolve(),
        config=config,
        changes=changes,
        metrics=_one_of_each_step(metrics),
        evals=_one_of_each_step(evals),
        result=result,
        samples=[(row, after.get(prompt)) for prompt, row in before.items()],
        sample_steps=[int(file.stem.removeprefix("step-")) for file in ends],
        gaps=folder.gaps,
    )


def number(row: Mapping[str, Any], key: str) -> float | None:
    """What `row` has there, if that is a number that a plot can have."""
    return float(row[key]) if _is(row.get(key), _NUMBER) else None


class _Folder:
    """Reads a run's files, and notes in `gaps` what they lack."""

    def __init__(self, path: Path) -> None:
        self.gaps: list[str] = []
        self._path = path

    def mapping(self, name: str, if_missing: str) -> Row:
        """Of a file in YAML or JSON."""
        path = self._path / name
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            content = json.loads(text or "{}") if path.suffix == ".json" else yaml.load(text, _PlainLoader)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            self.gaps.append(f"{name} cannot be read: {error}")
            return {}
        if content and not isinstance(content, dict):
            self.gaps.append(f"{name} cannot be read: it holds a {type(content).__name__}, no keys with values")
            return {}
        self._note_if_empty(name, content, if_missing)
        return content or {}

    def rows(self, name: str, wants: Mapping[str, Kind], if_missing: str) -> list[Row]:
        """Those lines of a JSON-lines file that have what is wanted of a row."""
        rows: list[Row] = []
        faults: list[str] = []
        path = self._path / name
        for line_number, (_, row) in enumerate(parsed_lines(path) if path.exists() else (), start=1):
            if isinstance(row, ValueError):
                faults.append(str(row))
            elif fault := _fault(row, wants):
                faults.append(f"line {line_number} {fault}")
            else:
                rows.append(row)
        if faults:
            more = f", and {len(faults) - _NAMED_LINES} more like them" * (len(faults) > _NAMED_LINES)
            self.gaps.append(f"{name}, {'; '.join(faults[:_NAMED_LINES])}{more}: left out")
        else:
            self._note_if_empty(name, rows, if_missing)
        return rows

    def _note_if_empty(self, name: str, content: Any, if_missing: str) -> None:
        if not content:
            self.gaps.append(f"{name} {'is empty' if (self._path / name).exists() else 'is missing'}: {if_missing}.")


class _PlainLoader(yaml.SafeLoader):
    """Takes no aliases, which make a few lines stand for any amount of text. A run's config has none."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*), which no run writes")
        return super().compose_node(parent, index)


def _fault(row: Any, wants: Mapping[str, Kind]) -> str | None:
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, no row"
    wrong = [key for key, kind in wants.items() if not _is(row.get(key), kind)]
    return f"has no {', '.join(wrong)}" if wrong else None


def _is(value: Any, kind: Kind) -> bool:
    """Of that type; a number, moreover, that a plot can have: not NaN, nor beyond what a float holds."""
    return isinstance(value, kind) and (not isinstance(value, _NUMBER) or abs(value) < _ENDLESS)


def _one_of_each_step(rows: Iterable[Row]) -> list[Row]:
    """The last that was written of each, in their order."""
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def _first_of_each_prompt(rows: Iterable[Row]) -> dict[str, Row]:
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["prompt"], row)
    return first
