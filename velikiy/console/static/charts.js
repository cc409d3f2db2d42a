// Charts over time, drawn as SVG: lines, or areas that are stacked. Their colours are the tokens of the style sheet, so
// they follow the theme, and a table has the same figures for whoever cannot see them.

import { element, svg } from "./dom.js";

const LEFT = 46, RIGHT = 8, TOP = 10, BOTTOM = 22;
const GRID = 3; // lines above zero

let made = 0; // charts so far, for their ids

// Returns { figure, update, end }: a figure, a function that draws it again with other samples, and one that stops it.
//
// series: [{ name, class, value: (sample) => number or null }]. span: seconds. format: (number) => text.
// texts: { table, time }. stacked: areas on top of each other. scale: [low, high] of a logarithmic scale; otherwise the
// scale begins with 0. top, limit: the least and the greatest upper end of a linear scale. height: in pixels.
// description: for screen readers. at: (seconds) => text of a moment.
export function timeChart({ title, description, series, span, format, texts, at, stacked = false, scale, top = 1,
  limit = Infinity, height = 180 }) {
  made += 1;
  const ids = [1, 2].map((n) => `chart-${made}-${n}`);
  const picture = svg("svg", { class: "chart-picture", role: "img", tabindex: "0", height,
    "aria-labelledby": ids.join(" ") });
  const shown = element("div", { class: "chart-legend" });
  const table = element("details", { class: "chart-table", ontoggle: () => fillTable() },
    element("summary", {}, texts.table));
  const figure = element("figure", { class: "chart surface" },
    element("figcaption", {}, element("span", { class: "chart-title" }, title), shown), picture, table);
  let samples = [], pointed = null, cursor = null;

  const resized = new ResizeObserver(() => draw());
  resized.observe(figure);
  picture.addEventListener("pointermove", (event) => point(event.offsetX));
  picture.addEventListener("pointerleave", () => point(null));
  picture.addEventListener("blur", () => point(null));
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !samples.length) return;
    event.preventDefault();
    pointed = Math.min(samples.length - 1, Math.max(0, (pointed ?? samples.length) + step));
    showPointed();
  });

  function update(newer) {
    samples = newer;
    draw();
    if (table.open) fillTable();
  }

  function width() {
    return Math.max(240, figure.clientWidth - 24);
  }

  function xOf(sample) {
    const last = samples.at(-1)[0];
    return LEFT + (1 - (last - sample[0]) / span) * (width() - LEFT - RIGHT);
  }

  // Values of a sample from the bottom up: of stacked series, where each area ends.
  function ends(sample) {
    let sum = 0;
    return series.map((one) => {
      const value = one.value(sample);
      return stacked ? (sum += value ?? 0) : value;
    });
  }

  function highest() {
    const most = Math.max(top, ...samples.flatMap((sample) => ends(sample).filter((value) => value !== null)));
    if (most >= limit) return limit;
    const unit = 10 ** Math.floor(Math.log10(most / GRID));
    return GRID * unit * ([1, 2, 3, 5, 10].find((factor) => GRID * unit * factor >= most) ?? 10);
  }

  function draw() {
    const wide = width();
    picture.setAttribute("viewBox", `0 0 ${wide} ${height}`);
    picture.setAttribute("width", wide);
    const content = [svg("title", { id: ids[0] }, title), svg("desc", { id: ids[1] }, `${description} ${latest()}`)];
    const grid = limit === Infinity ? GRID : 4;
    const high = scale ? scale[1] : highest();
    const bottom = height - BOTTOM;
    const share = scale
      ? (value) => Math.log(Math.min(scale[1], Math.max(scale[0], value)) / scale[0]) / Math.log(scale[1] / scale[0])
      : (value) => Math.min(1, value / high);
    const yOf = (value) => bottom - share(value) * (bottom - TOP);
    const marks = scale
      ? Array.from({ length: Math.round(Math.log10(scale[1] / scale[0])) + 1 }, (_, n) => scale[0] * 10 ** n)
      : Array.from({ length: grid + 1 }, (_, n) => (high / grid) * n);
    for (const mark of marks) {
      const y = Math.round(yOf(mark)) + 0.5;
      content.push(svg("line", { class: "chart-grid", x1: LEFT, x2: wide - RIGHT, y1: y, y2: y }),
        svg("text", { class: "chart-mark", x: LEFT - 6, y: y + 4, "text-anchor": "end" }, format(mark)));
    }
    if (samples.length) content.push(...timeMarks(wide), ...(stacked ? areas(yOf) : lines(yOf)));
    cursor = svg("line", { class: "chart-cursor", y1: TOP, y2: bottom, visibility: "hidden" });
    picture.replaceChildren(...content, cursor);
    showPointed();
  }

  function timeMarks(wide) {
    const last = samples.at(-1)[0], every = wide < 420 ? 300 : 180;
    const first = Math.ceil((last - span) / every) * every;
    const marks = [];
    for (let moment = first; moment <= last; moment += every) {
      const x = xOf([moment]);
      if (x < LEFT + 12 || x > wide - 22) continue;
      marks.push(svg("text", { class: "chart-mark", x, y: height - 5, "text-anchor": "middle" }, at(moment, true)));
    }
    return marks;
  }

  // Runs of samples without a gap.
  function runs() {
    const found = [];
    for (const sample of samples) {
      const run = found.at(-1);
      if (run && sample[0] - run.at(-1)[0] <= 6) run.push(sample);
      else found.push([sample]);
    }
    return found;
  }

  function areas(yOf) {
    return series.map((one, index) => {
      const path = runs().map((run) => {
        const upper = run.map((sample) => `${xOf(sample).toFixed(1)},${yOf(ends(sample)[index]).toFixed(1)}`);
        const lower = run.map((sample) =>
          `${xOf(sample).toFixed(1)},${yOf(index ? ends(sample)[index - 1] : 0).toFixed(1)}`).reverse();
        return `M${upper.join("L")}L${lower.join("L")}Z`;
      }).join("");
      return svg("path", { class: `chart-area ${one.class}`, d: path });
    });
  }

  function lines(yOf) {
    return series.map((one) => {
      let path = "", before = null;
      for (const sample of samples) {
        const value = one.value(sample);
        if (value === null) continue;
        // A tier that answers now and then has few values: they are joined, unless a minute is without any.
        const joins = before !== null && sample[0] - before <= 60;
        path += `${joins ? "L" : "M"}${xOf(sample).toFixed(1)},${yOf(value).toFixed(1)}${joins ? "" : "h1"}`;
        before = sample[0];
      }
      return svg("path", { class: `chart-line ${one.class}`, d: path });
    });
  }

  function point(x) {
    if (x === null || !samples.length) pointed = null;
    else {
      let best = 0;
      samples.forEach((sample, n) => {
        if (Math.abs(xOf(sample) - x) < Math.abs(xOf(samples[best]) - x)) best = n;
      });
      pointed = best;
    }
    showPointed();
  }

  // The legend has the figures of the moment under the pointer, or else the newest.
  function showPointed() {
    const sample = pointed === null ? samples.at(-1) : samples[Math.min(pointed, samples.length - 1)];
    shown.replaceChildren(...series.map((one) => element("span", { class: `chart-key ${one.class}` },
      element("span", { class: "chart-swatch", "aria-hidden": "true" }), one.name,
      element("b", {}, sample ? text(one, sample) : "–"))),
    element("span", { class: "chart-moment" }, pointed === null || !sample ? "" : at(sample[0])));
    if (!cursor) return;
    cursor.setAttribute("visibility", pointed === null ? "hidden" : "visible");
    if (pointed !== null && sample) {
      cursor.setAttribute("x1", xOf(sample));
      cursor.setAttribute("x2", xOf(sample));
    }
  }

  function text(one, sample) {
    const value = one.value(sample);
    return value === null ? "–" : format(value);
  }

  function latest() {
    const sample = samples.at(-1);
    return sample ? series.map((one) => `${one.name}: ${text(one, sample)}`).join(", ") : "";
  }

  // One row for each half minute: a reader of the table wants the course, not each sample.
  function fillTable() {
    table.querySelector("table")?.parentElement.remove();
    if (!table.open) return;
    const rows = samples.filter((sample, n) => n === samples.length - 1 || sample[0] % 30 === 0).reverse();
    table.append(element("div", { class: "chart-rows", tabIndex: 0, role: "region", "aria-label": title },
      element("table", { class: "table table-sm" },
        element("thead", {}, element("tr", {}, element("th", { scope: "col" }, texts.time),
          series.map((one) => element("th", { scope: "col" }, one.name)))),
        element("tbody", {}, rows.map((sample) => element("tr", {},
          element("th", { scope: "row" }, at(sample[0])), series.map((one) => element("td", {}, text(one, sample)))))))));
  }

  return { figure, update, end: () => resized.disconnect() };
}
