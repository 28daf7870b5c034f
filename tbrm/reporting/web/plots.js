"use strict";
// Draws the page's plots with uPlot, from the JSON in the page. Names in it may be anybody's: they become text, never HTML.
(() => {
const {axes, x: places, figures, groups} = JSON.parse(document.getElementById("plots").textContent);
const elements = [...document.querySelectorAll("[data-figure]")];
const state = {axis: "step", hidden: new Set(), zoom: null, drawn: []};

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const plain = new Intl.NumberFormat("en", {maximumSignificantDigits: 4});
const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4});
const percent = new Intl.NumberFormat("en", {style: "percent", maximumFractionDigits: 1});

function text(value, figure) {
  if (figure?.percent) return percent.format(value);
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-4)) return value.toExponential(2);
  return (size >= 1e5 ? compact : plain).format(value);
}

// Seconds are shown as minutes or hours where they are many.
const longest = Math.max(0, ...places.flatMap((place) => (place.seconds ?? []).filter((value) => value !== null)));
const [unit, seconds] = longest > 3 * 3600 ? ["hours", 3600] : longest > 300 ? ["minutes", 60] : ["seconds", 1];
const scaled = (value) => (state.axis === "seconds" ? value / seconds : value);
const axisName = (axis) => axes[axis].replace("seconds", unit);

// The curves that are shown, each as columns of x, y, and the ends of its band, without points whose x is not known.
function curvesOf(figure) {
  return figure.curves.filter((curve) => !state.hidden.has(curve.group)).flatMap((curve) => {
    const along = places[curve.x][state.axis] ?? [];
    const at = along.map((_, i) => i).filter((i) => along[i] !== null && along[i] !== along[i + 1]);
    const columns = [curve.y, curve.low, curve.high].filter(Boolean).map((values) => at.map((i) => values[i]));
    return at.length ? [{...groups[curve.group], ...curve, table: [at.map((i) => scaled(along[i])), ...columns]}] : [];
  });
}

// Each phase on top of those before it: the highest is drawn first, and the others over it.
function stacked(curves) {
  const rising = curves.map((curve) => ({...curve, shown: curve.table[1]}));
  rising.forEach((curve, i) => {
    const below = i ? rising[i - 1].table[1] : null;
    curve.table = [curve.table[0], curve.table[1].map((value, j) => (value ?? 0) + (below ? below[j] : 0))];
  });
  return rising.reverse();
}

// Bands first, so that every line is above them all. Notes at each curve where its line and its band's edges are.
function seriesOf(curves, figure) {
  const series = [{}], bands = [], data = [];
  const add = (curve, column, look) => {
    data.push([curve.table[0], curve.table[column]]);
    return series.push(look) - 1;
  };
  for (const curve of curves.filter((curve) => curve.table.length > 2)) {
    curve.edges = [2, 3].map((column) => add(curve, column, {stroke: "transparent", width: 0, points: {show: false}}));
    bands.push({series: [curve.edges[1], curve.edges[0]], fill: `${colour(curve.colour)}2e`});
  }
  for (const curve of curves) {
    const line = colour(curve.colour);
    const few = curve.table[0].length < 50;
    curve.index = add(curve, 1, {stroke: line, width: figure.stacked ? 1 : 2, dash: curve.dash,
                                 fill: figure.stacked ? line : undefined, points: {show: few, size: few ? 5 : 0, fill: line}});
  }
  return {series, bands, data: uPlot.join(data)};
}

function rangeOf(figure) {
  if (figure.key === "accuracy") return (u, low, high) => [0, high > 0.9 ? 1.05 : Math.max(0.1, 1.15 * high)];
  if (figure.stacked) return (u, low, high) => [0, 1.05 * (high || 1)];
  if (figure.percent) return (u, low, high) => [0, Math.min(1.05, 1.15 * (high || 0.1))];
  return undefined;
}

// On a log scale 1, 2 and 5 of each decade, or the decades alone where there are many.
function shownOf(figure, splits, u) {
  const {min, max} = u.scales.y;
  const leading = !figure.log ? null : max / min > 300 ? [1] : [1, 2, 5];
  return splits.map((value) => (!leading || leading.includes(Number(value.toExponential(0)[0])) ? value : null));
}

function drawBaseline(u) {
  const {left, top, width, height} = u.bbox;
  u.ctx.fillStyle = colour("muted");
  u.ctx.fillRect(left, top + height, width, devicePixelRatio);
}

function optionsOf(element, figure, curves) {
  const [ink, grid] = [colour("muted"), colour("grid")];
  const axis = {stroke: ink, font: "12px system-ui, sans-serif", ticks: {show: false}};
  const filter = (u, splits) => shownOf(figure, splits, u);
  const width = (u, values) => 14 + 7 * Math.max(0, ...(values ?? []).map((value) => `${value ?? ""}`.length));
  return {
    width: element.clientWidth, height: element.clientHeight, padding: [10, 14, 0, 0], legend: {show: false},
    ...seriesOf(curves, figure),
    scales: {
      x: {time: false, range: (u, low, high) => state.zoom ?? padded(low, high)},
      y: {distr: figure.log ? 3 : 1, range: rangeOf(figure)},
    },
    axes: [
      {...axis, grid: {show: false}, size: 28, space: 60,
       values: (u, splits) => splits.map((value) => text(value)),
       incrs: state.axis === "seconds" ? undefined : [1, 2, 5].flatMap((n) => [...Array(13).keys()].map((e) => n * 10 ** e))
                                                               .sort((a, b) => a - b),
       label: axisName(state.axis), labelFont: "12px system-ui, sans-serif", labelSize: 18, labelGap: 0},
      {...axis, grid: {stroke: grid, width: 1, filter}, filter, size: width, space: 32,
       values: (u, splits) => splits.map((value) => (value === null ? "" : text(value, figure)))},
    ],
    cursor: {y: false, sync: {key: "tbrm", scales: ["x", null]}, drag: {x: true, y: false, setScale: false},
             hover: {prox: 1e6}, points: {size: 7}, bind: {dblclick: () => () => zoomTo(null)}},
    hooks: {
      drawAxes: [drawBaseline],
      setCursor: [(u) => showTip(u, figure, curves)],
      setSelect: [(u) => {
        const {left, width} = u.select;
        if (width > 5) zoomTo([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
        u.setSelect({left: 0, top: 0, width: 0, height: 0}, false);
      }],
    },
  };
}

function padded(low, high) {
  const margin = low === high ? 1 : 0.02 * (high - low);
  return [low - margin, high + margin];
}

function made(tag, className, content) {
  const element = document.createElement(tag);
  element.className = className;
  if (content !== undefined) element.textContent = content;
  return element;
}

// What the curves have where the pointer is: of each the nearest point.
function showTip(u, figure, curves) {
  u.tip.hidden = !u.over.matches(":hover") || u.cursor.idx == null || u.cursor.left < 0;
  if (u.tip.hidden) return;
  u.tip.replaceChildren(made("b", "", `${axisName(state.axis)} ${text(u.data[0][u.cursor.idx])}`));
  for (const curve of figure.stacked ? [...curves].reverse() : curves) {
    const at = u.cursor.idxs[curve.index];
    if (at == null || u.data[curve.index][at] == null) continue;
    const value = figure.stacked ? curve.shown[at] : u.data[curve.index][at];
    const row = made("span", "tip-row");
    const swatch = made("i", `swatch ${curve.colour}`);
    if (curve.style) swatch.classList.add(curve.style);
    row.append(swatch, made("span", "tip-label", figure.curves.length > 1 ? curve.label : ""), made("b", "", text(value, figure)));
    if (curve.edges) {
      const [low, high] = curve.edges.map((edge) => u.data[edge][at]);
      if (low != null && high != null) row.append(made("span", "muted", `${text(low, figure)} to ${text(high, figure)}`));
    }
    u.tip.append(row);
  }
  const rightHalf = u.cursor.left > u.over.clientWidth / 2;
  u.tip.style.left = rightHalf ? "auto" : `${u.cursor.left + 12}px`;
  u.tip.style.right = rightHalf ? `${u.over.clientWidth - u.cursor.left + 12}px` : "auto";
}

function drawOne(element) {
  const figure = {key: element.dataset.figure, ...figures[element.dataset.figure]};
  const curves = figure.stacked ? stacked(curvesOf(figure)) : curvesOf(figure);
  element.replaceChildren();
  if (!curves.length) {
    element.append(made("p", "muted", "not recorded"));
    return [];
  }
  const u = new uPlot(optionsOf(element, figure, curves), null, element);
  u.tip = made("div", "tip");
  u.tip.hidden = true;
  u.over.append(u.tip);
  u.over.addEventListener("mouseleave", () => { u.tip.hidden = true; });
  return [u];
}

function draw() {
  state.drawn.forEach((u) => u.destroy());
  state.drawn = elements.flatMap(drawOne);
  document.querySelectorAll("[data-axis]").forEach((button) => {
    button.setAttribute("aria-pressed", button.dataset.axis === state.axis);
  });
  document.querySelectorAll("[data-group]").forEach((button) => {
    button.setAttribute("aria-pressed", !state.hidden.has(Number(button.dataset.group)));
  });
}

function zoomTo(range) {
  state.zoom = range;
  document.querySelectorAll("[data-whole]").forEach((button) => { button.hidden = range === null; });
  state.drawn.forEach((u) => u.setScale("x", {min: u.data[0][0], max: u.data[0].at(-1)}));
}

document.addEventListener("click", ({target}) => {
  const button = target.closest("button");
  if (button?.dataset.axis) {
    state.axis = button.dataset.axis;
    zoomTo(null);
    draw();
  } else if (button?.dataset.group) {
    const group = Number(button.dataset.group);
    if (!state.hidden.delete(group)) state.hidden.add(group);
    draw();
  } else if (button && "whole" in button.dataset) {
    zoomTo(null);
  }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
new ResizeObserver(() => state.drawn.forEach((u) => {
  const {clientWidth: width, clientHeight: height} = u.root.parentElement;
  if (width !== u.width || height !== u.height) u.setSize({width, height});
})).observe(document.querySelector("main"));
draw();
})();
