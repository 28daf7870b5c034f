"""Tables and plots of the head's benchmark, from the files that its two halves wrote.

python -m bench.table TIMES.json MEMORY.json bench/results
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.ways import WAYS

COLUMNS = (
    "dtype",
    "vocab",
    "tokens",
    "way",
    "seconds",
    "over_floor",
    "peak_mib",
    "error_hidden",
    "error_weight",
    "note",
)


def rows_of(times: dict[str, Any], memory: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per way and shape; the time is the median."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for benchmark in times["benchmarks"]:
        info = benchmark["extra_info"]
        key = (info["dtype"].removeprefix("torch."), info["vocab"], info["tokens"], info["way"])
        rows[key] = {
            **dict(zip(COLUMNS, key, strict=False)),
            **info,
            "dtype": key[0],
            "seconds": benchmark["stats"]["median"],
        }
    for result in memory:
        key = (result["dtype"], result["vocab"], result["tokens"], result["way"])
        row = rows.setdefault(key, dict(zip(COLUMNS, key, strict=False)))
        row["peak_mib"] = result.get("peak_mib")
        row["note"] = result.get("failure", "")
    for (dtype, vocab, tokens, way), row in rows.items():
        base = "scoring: one product" if way.startswith("scoring") else "floor"
        floor = rows.get((dtype, vocab, tokens, base))
        if floor and row.get("seconds"):
            row["over_floor"] = row["seconds"] / floor["seconds"]
    order = ["floor", *WAYS]
    return sorted(
        rows.values(),
        key=lambda r: (r["dtype"], r["vocab"], r["tokens"], order.index(r["way"]) if r["way"] in order else 99),
    )


def markdown(rows: list[dict[str, Any]], machine: str) -> str:
    lines = [
        f"Made by `make bench` on {machine}. Time: median of a forward and backward pass, over that of the three bare",
        "products (for scoring: a forward pass, over one) in the same run. Memory: peak beyond the inputs, gradients included.",
        "Errors: of the gradients at 64 tokens, relative to float64, in the 2-norm.",
        "",
    ]
    for dtype, vocab, tokens in dict.fromkeys((r["dtype"], r["vocab"], r["tokens"]) for r in rows):
        lines += [
            f"### {dtype}, V = {vocab}, T = {tokens}",
            "",
            "| | time, ms | over floor | peak, MiB | error, hidden | error, weight |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            if (row["dtype"], row["vocab"], row["tokens"]) == (dtype, vocab, tokens):
                cells = [
                    _cell(row, "seconds", lambda x: f"{x * 1e3:.0f}"),
                    _cell(row, "over_floor", lambda x: f"{x:.2f}"),
                    _cell(row, "peak_mib", lambda x: f"{x:.0f}"),
                    _cell(row, "error_hidden", lambda x: f"{x:.1e}"),
                    _cell(row, "error_weight", lambda x: f"{x:.1e}"),
                ]
                note = f" ({row['note']})" if row.get("note") else ""
                lines.append(f"| {row['way']}{note} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str, text: Any) -> str:
    return text(row[name]) if row.get(name) is not None else ""


def plot_time(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of time over the floor at the first shape measured, for each dtype."""
    shape = (32768, 1024) if any((r["vocab"], r["tokens"]) == (32768, 1024) for r in rows) else None
    shape = shape or (rows[0]["vocab"], rows[0]["tokens"])
    dtypes = sorted({r["dtype"] for r in rows})
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 3.6), sharey=True, squeeze=False)
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        ratios = {
            r["way"]: r.get("over_floor") for r in rows if (r["dtype"], r["vocab"], r["tokens"]) == (dtype, *shape)
        }
        ways = [way for way in WAYS if ratios.get(way)]
        bars = ax.barh(
            ways, [ratios[w] for w in ways], color=["#c44e52" if w.startswith("tbrm") else "#8c8c8c" for w in ways]
        )
        ax.bar_label(bars, fmt="%.2f", padding=3)
        ax.axvline(1, color="black", lw=0.8, ls=":")
        ax.margins(x=0.12)
        ax.set(title=dtype, xlabel="time over three bare products")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"TBRM loss and gradients: V = {shape[0]}, T = {shape[1]}, D = 896", y=1.05)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_memory(rows: list[dict[str, Any]], path: Path) -> None:
    """Peak memory against the number of tokens, at the smallest vocabulary measured, in bfloat16."""
    vocab = min(r["vocab"] for r in rows)
    figure, ax = plt.subplots(figsize=(6, 3.8))
    for way in WAYS:
        points = sorted(
            (r["tokens"], r["peak_mib"])
            for r in rows
            if r["way"] == way and r["vocab"] == vocab and r["dtype"] == "bfloat16" and r.get("peak_mib")
        )
        if points:
            ours = way.startswith("tbrm")
            ax.plot(*zip(*points, strict=True), marker="o", lw=2.4 if ours else 1.2, label=way)
    ax.set(xlabel="tokens", ylabel="MiB beyond inputs, gradients included", yscale="log", xscale="log")
    ax.set_title(f"Peak memory, bfloat16, V = {vocab}, D = 896")
    ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    times_path, memory_path, out = map(Path, sys.argv[1:])
    times = json.loads(times_path.read_text())
    rows = rows_of(times, json.loads(memory_path.read_text()))
    cpu = times["machine_info"]["cpu"]
    machine = f"{cpu.get('brand_raw', 'an unnamed CPU')} ({times['machine_info'].get('torch', '')})"
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
