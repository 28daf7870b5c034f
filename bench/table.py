"""Tables and plots of the head's benchmark, from the file that pytest-benchmark wrote.

python -m bench.table RESULTS.json [MORE.json ...] bench/results
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from bench.plots import plot_memory, plot_time
from bench.problem import LENGTH, D
from bench.ways import FLOOR, ONE_PRODUCT, SCORING, WAYS
from bench.worker import CHECKED_TOKENS

COLUMNS = (
    "dtype",
    "vocab",
    "tokens",
    "way",
    "seconds",
    "rounds",
    "over_floor",
    "least_over_floor",
    "peak_mib",
    "error_loss",
    "error_hidden",
    "error_weight",
    "note",
)


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per way and shape; `seconds` is the median of the rounds, `least` the least of them."""
    measured = [
        {**run["extra_info"], "seconds": stats["median"], "least": stats["min"], "rounds": stats["rounds"]}
        for run in results["benchmarks"]
        for stats in [run["stats"]]
    ]
    rows = measured + results["failures"]
    floors = {(*shape_of(row), row["way"]): row for row in rows}
    for row in rows:
        floor = floors.get((*shape_of(row), ONE_PRODUCT if row["way"] in (ONE_PRODUCT, SCORING) else FLOOR), {})
        if "seconds" in floor and "seconds" in row:
            row["over_floor"] = row["seconds"] / floor["seconds"]
            row["least_over_floor"] = row["least"] / floor["least"]
    return rows


def joined(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all runs, each over the floor of its own run; where two have measured the same, those of the first."""
    rows: dict[tuple[object, ...], dict[str, Any]] = {}
    for run in runs:
        for row in rows_of(run):
            rows.setdefault((*shape_of(row), row["way"]), row)
    order = [FLOOR, *WAYS, ONE_PRODUCT, SCORING]
    return sorted(rows.values(), key=lambda row: (*shape_of(row), order.index(row["way"])))


def shape_of(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["dtype"], row["vocab"], row["tokens"]


def markdown(rows: list[dict[str, Any]], machine: str) -> str:
    lines = [
        f"Made by `make bench` on {machine}. T tokens in trajectories of {LENGTH}, D = {D}. Time:",
        "median of the rounds, each a forward and backward pass, over that of the three bare products (for scoring: a forward",
        "pass, over one product) in the same run; least: the least of the rounds over the least of theirs. Memory: peak beyond",
        "the inputs, gradients included, in a process of its own.",
        f"Errors: of loss and gradients at {CHECKED_TOKENS} tokens, relative to float64; of gradients in the 2-norm.",
        "A trajectory that is longer than a chunk of the single pass (where there are several: 512 tokens in bfloat16, 256 in",
        'float32) would take the time of "recompute".',
        "",
    ]
    for shape in dict.fromkeys(map(shape_of, rows)):
        lines += [
            "### {}, V = {}, T = {}".format(*shape),
            "",
            "| | time, ms | rounds | over floor | least | peak, MiB | error, loss | error, hidden | error, weight |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if shape_of(row) == shape:
                cells = [
                    _cell(row, "seconds", lambda x: f"{x * 1e3:.0f}"),
                    _cell(row, "rounds", str),
                    _cell(row, "over_floor", lambda x: f"{x:.2f}"),
                    _cell(row, "least_over_floor", lambda x: f"{x:.2f}"),
                    _cell(row, "peak_mib", lambda x: f"{x:.0f}"),
                    _cell(row, "error_loss", lambda x: f"{x:.1e}"),
                    _cell(row, "error_hidden", lambda x: f"{x:.1e}"),
                    _cell(row, "error_weight", lambda x: f"{x:.1e}"),
                ]
                note = f" ({row['note']})" if row.get("note") else ""
                lines.append(f"| {row['way']}{note} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str, text: Any) -> str:
    return text(row[name]) if row.get(name) is not None else ""


def main() -> None:
    *paths, out = map(Path, sys.argv[1:])
    runs = [json.loads(path.read_text()) for path in paths]
    info = runs[0]["machine_info"]
    rows = joined(runs)
    machine = f"{info['cpu'].get('brand_raw', 'an unnamed CPU')} ({info['torch']})"
    out.mkdir(parents=True, exist_ok=True)
    (out / "trajectory_loss.md").write_text(markdown(rows, machine))
    with (out / "trajectory_loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plot_time(rows, out / "time.png")
    plot_memory(rows, out / "memory.png")
    print(f"{out}/trajectory_loss.md, .csv, time.png and memory.png are written")


if __name__ == "__main__":
    main()
