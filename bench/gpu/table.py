"""Tables of what `bench/gpu.sh` brought back.

python -m bench.gpu.table FOLDER OUT.md
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.gpu.json_lines import read

Row = dict[str, Any]
IDLE = 0.6  # of the highest clock; below, it is not the power limit that slows a card down

HEAD_NOTES = """Loss and both gradients of trajectories of 256 tokens in bfloat16, over the three bare products of these shapes,
which are run in turns with it (scoring: the forward alone, over one product). Medians of CUDA events after a first round, with
caches flushed before each; least: the least over the least. The floor over itself shows what is noise. TFLOP/s: the products'
operations over a way's time. Peak: beyond the inputs, gradients included. Errors: of the gradients against float64, in the
2-norm. MHz: the median clock of the multiprocessors while they worked, and the least."""


def main(folder: Path, out: Path) -> None:
    card = {row["what"]: row["value"] for row in read(folder / "card.jsonl")}
    name = str(card.get("card", "a card that was not asked its name"))
    parts = [
        f"Made by `bench/gpu.sh` on {name}.",
        *of_card(name, card),
        *of_tests(name, read(folder / "tests.jsonl")),
        *of_head(name, read(folder / "head.jsonl"), float(card.get("clocks.max.sm, after work") or 0)),
        *of_trainer(name, read(folder / "trainer.jsonl")),
    ]
    out.write_text("\n".join(parts) + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def of_card(name: str, card: Row) -> list[str]:
    values = ((what, f"{value:.4g}" if isinstance(value, float) else str(value)) for what, value in card.items())
    return [f"\n## {name}: what it is\n", *table(("what", "value"), values)]


def of_tests(name: str, rows: list[Row]) -> list[str]:
    counts = Counter(row["outcome"] for row in rows)
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()) or "none ended"
    lines = [
        f"\n## {name}: tests of the kernels\n",
        f"{said}; {sum(row.get('seconds', 0) for row in rows):.0f} s of tests.",
    ]
    for row in rows:
        if row["outcome"] not in ("passed", "skipped"):
            last = (row.get("why") or "").strip().splitlines()[-1:]
            lines.append(f"- {row['outcome']}: `{row['test']}` {' '.join(last)}")
    return lines


def of_head(name: str, rows: list[Row], most_mhz: float) -> list[str]:
    merged: dict[tuple[str, str], Row] = {}
    for row in rows:  # of a cell the last row counts
        cell = merged.setdefault((row["head"], row["way"]), {})
        cell |= {key: value for key, value in row.items() if key != "note"}
        cell.setdefault("notes", {})[row["what"]] = row.get("note")
    columns = ("", "over floor", "least", "ms", "floor, ms", "TFLOP/s", "peak, MiB", "floor's peak", "error, hidden",
               "error, weight", "repeats", "MHz", "note")  # fmt: skip
    lines = []
    for head in dict.fromkeys(head for head, _ in merged):
        cells = {way: row for (of, way), row in merged.items() if of == head}
        shape = next((row for row in cells.values() if "vocab" in row), {})
        sizes = f"V = {shape.get('vocab')}, D = {shape.get('width')}, T = {shape.get('tokens')}"
        lines += [f"\n## {name}: the head of a {head} model, {sizes}\n"]
        lines += table(columns, (head_row(way, row, most_mhz) for way, row in cells.items()))
    return [*lines, "", HEAD_NOTES] if lines else []


def head_row(way: str, row: Row, most_mhz: float) -> list[str]:
    clock = f"{row['mhz']} ({row['least_mhz']})" if "mhz" in row else ""
    notes = [f"{what}: {note}" for what, note in row["notes"].items() if note]
    if "mhz" in row and row["mhz"] < IDLE * most_mhz:
        notes.append(f"an idle clock: at most it is {most_mhz:.0f} MHz")
    note = "; ".join(notes)
    return [
        way,
        *(number(row, key, "{:.2f}") for key in ("over_floor", "least_over_floor")),
        *(number(row, key, "{:.2f}") for key in ("ms", "floor_ms")),
        number(row, "tflops", "{:.0f}"),
        *(number(row, key, "{:.0f}") for key in ("peak_mib", "floor_peak_mib")),
        *(number(row, key, "{:.1e}") for key in ("error_hidden", "error_weight")),
        number(row, "repeats", "{}"),
        clock,
        note.replace("|", "/").replace("\n", " "),
    ]


def number(row: Row, key: str, form: str) -> str:
    return form.format(row[key]) if row.get(key) is not None else ""


def of_trainer(name: str, rows: list[Row]) -> list[str]:
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        said = {row["what"]: row for row in rows if row["case"] == case}
        steps = [row for row in rows if row["case"] == case and row["what"] == "step"]
        lines += [f"\n## {name}: a training step, {case}\n"]
        values = [(what, f"{row['value']} {row.get('note', '')}") for what, row in said.items() if what != "step"]
        lines += table(("what", "value"), [*values, *of_steps(steps, said)])
    return lines


def of_steps(steps: list[Row], said: Row) -> Iterable[Sequence[str]]:
    """Of the steps after the first, which also compiles."""
    if len(steps) < 2:
        return
    later = steps[1:]
    seconds = median(row["seconds"] for row in later)
    tokens = later[-1]["tokens"]
    yield "tokens a second", f"{tokens / seconds:.0f}"
    yield "tokens of a step", str(tokens)
    yield "seconds of a step, median (first)", f"{seconds:.3f} ({steps[0]['seconds']:.3f}), {len(later)} steps"
    for key in (key for key in later[-1] if key.startswith("seconds/")):
        yield f"of these {key.removeprefix('seconds/')}", f"{median(row[key] for row in later):.3f}"
    peak, planned = later[-1]["peak_memory_mib"], said.get("planned_mib", {}).get("value")
    yield "peak, MiB", f"{peak:.0f}"
    if planned:
        yield "planned / measured", f"{planned / peak:.2f}"
    if parameters := said.get("parameters", {}).get("value"):
        # 2 a parameter and token forward, and again for the reference; 4 backward. Attention's own products left out.
        yield "TFLOP/s of the weights' products", f"{8 * parameters * tokens / seconds / 1e12:.1f}"
    yield "loss, first and last", f"{steps[0]['loss']:.4g}, {steps[-1]['loss']:.4g}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
