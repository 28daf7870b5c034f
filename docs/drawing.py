"""A flowchart of Mermaid's, `a --> b` a line, as SVG, which browsers show with nothing loaded."""

from __future__ import annotations

import html
from functools import cache
from itertools import pairwise
from statistics import fmean

ROW, WIDTH, HEIGHT, GAP = 62, 118, 30, 24


def svg(chart: str) -> str:
    """Each name a row below the last that leads to it; an arrow over several rows has a place of its own in each."""
    arrows = [(a, b) for line in chart.splitlines() if "-->" in line for a, b in [map(str.strip, line.split("-->"))]]
    names = dict.fromkeys(name for arrow in arrows for name in arrow)

    @cache
    def depth(name: str) -> int:
        return max((depth(a) + 1 for a, b in arrows if b == name), default=0)

    ways = [[a, *(f"{a} {b} {row}" for row in range(depth(a) + 1, depth(b))), b] for a, b in arrows]
    steps = dict.fromkeys(step for way in ways for step in pairwise(way))
    rows: list[list[str]] = [[] for _ in range(max(map(depth, names)) + 1)]
    for way in ways:
        for row, place in enumerate(way, start=depth(way[0])):
            row = depth(place) if place in names else row
            rows[row] += [place] * (place not in rows[row])
    at = _places(rows, steps, set(names))
    left, right = (pick(x for x, _ in at.values()) for pick in (min, max))
    tip = '<marker id="tip" refX="5" refY="3" markerWidth="7" markerHeight="6" orient="auto"><path d="M0 0L6 3L0 6z"/></marker>'
    box = f'viewBox="{left - WIDTH / 2 - 2:.0f} 0 {right - left + WIDTH + 4:.0f} {ROW * len(rows)}"'
    shapes = [_line(at[a], at[b], a in names, b in names) for a, b in steps] + [_box(name, *at[name]) for name in names]
    return f'<svg class="flowchart" {box} role="img">{tip}{"".join(shapes)}</svg>'


def _places(
    rows: list[list[str]], steps: dict[tuple[str, str], None], names: set[str]
) -> dict[str, tuple[float, float]]:
    """In each row in the order of what leads there, and as close to its middle as there is room."""
    at: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        row.sort(key=lambda place: fmean([at[a][0] for a, b in steps if b == place] or [0]))
        widths = [(WIDTH if place in names else 0) + GAP for place in row]
        x = -sum(widths) / 2
        for place, width in zip(row, widths, strict=True):
            at[place] = (x + width / 2, ROW * (number + 0.5))
            x += width
    return at


def _line(start: tuple[float, float], end: tuple[float, float], from_box: bool, to_box: bool) -> str:
    (x1, y1), (x2, y2) = start, end
    y1, y2 = y1 + HEIGHT / 2 * from_box, y2 - HEIGHT / 2 * to_box
    middle = (y1 + y2) / 2
    marker = ' marker-end="url(#tip)"' if to_box else ""
    return f'<path class="arrow" d="M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"{marker}/>'


def _box(name: str, x: float, y: float) -> str:
    place = f'x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="4"'
    return f'<rect {place}/><text x="{x:.0f}" y="{y + 5:.0f}">{html.escape(name)}</text>'
