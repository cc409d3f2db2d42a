// Prove it: the experiment as a picture. Lanes are edges, vertical lines are writes, dots are reads.

import { TIERS } from "./badge.js";
import { announce, element, svg } from "./dom.js";
import { cleanUp, perform, SECONDS, TTL_S } from "./experiment.js";
import { edgesFor, failed } from "./states.js";
import { milliseconds, number, translator } from "./texts.js";
import { texts } from "./texts/prove.js";

const t = translator(texts);

const LEFT = 172, RIGHT = 14, TOP = 26, LANE = 30, HEAD = 24, GAP = 16, AXIS = 22;
const LEAST_WIDTH = 860; // narrower, the reads of one lane would lie on each other: a phone scrolls sideways
const DRAW_EVERY_MS = 100;

export async function show(main, context) {
  const { query, api, signal } = context;
  const asked = Number(query.get("seconds")); // #/prove?seconds=60
  const seconds = asked >= 3 && asked <= 120 ? asked : SECONDS;
  const known = await edgesFor(main, head(), context, () => show(main, context));
  if (!known) return;
  cleanUp(api);
  let edges = edgesOf(known), run = newRun(), controller = null;

  const reached = element("p", { class: "prove-edges" });
  const showReached = (found) => {
    edges = edgesOf(found);
    reached.textContent = found.edges.length ? t("edges", { count: edges.length }) : t("edges_unknown");
  };
  showReached(known);
  const button = element("button", { type: "button", class: "btn btn-primary btn-lg prove-start", id: "prove-start" },
    t("start"));
  const progress = element("progress", { class: "prove-progress", max: seconds, value: 0, hidden: true,
    "aria-label": t("progress") });
  const message = element("div", {});
  const counters = element("div", { class: "prove-counters" });
  const verdict = element("p", { class: "prove-verdict", id: "prove-verdict" });
  const frame = element("div", { class: "surface prove-frame", tabIndex: 0, role: "region", "aria-label": t("picture") });
  const numbers = element("details", { class: "prove-numbers", ontoggle: () => fillNumbers() },
    element("summary", {}, t("numbers")));

  button.addEventListener("click", () => (controller ? controller.abort() : start()));
  frame.addEventListener("scroll", keepNamesInView);
  const resized = new ResizeObserver(() => drawAll());
  resized.observe(frame);
  signal.addEventListener("abort", () => resized.disconnect());

  async function start() {
    controller = new AbortController();
    const own = AbortSignal.any([signal, controller.signal]);
    const found = await api.request("GET", "/console/edges", { signal: own }); // others may run by now
    if (found.ok) showReached(found.body);
    run = newRun();
    message.replaceChildren();
    verdict.textContent = "";
    button.textContent = t("stop");
    button.classList.replace("btn-primary", "btn-outline-secondary");
    progress.hidden = false;
    const timer = setInterval(() => drawAll(), DRAW_EVERY_MS);
    run.began = performance.now();
    announce(t("started"));
    const { problem } = await perform({ api, edges, run, signal: own, seconds });
    clearInterval(timer);
    controller = null;
    if (signal.aborted) return;
    run.isOver = true;
    run.lasted = Math.min(seconds, (performance.now() - run.began) / 1000);
    button.textContent = t("again");
    button.classList.replace("btn-outline-secondary", "btn-primary");
    progress.hidden = true;
    if (problem) message.replaceChildren(failed(problem, start));
    else if (run.reads.length) conclude();
    drawAll();
    if (numbers.open) fillNumbers();
  }

  function conclude() {
    const { stale, aside, judged, missed } = totals(run);
    const sentences = judged ? [stale ? t("verdict_stale", { count: stale }) : t("verdict_none", { count: judged }),
      t("verdict_aside", { count: aside })] : [];
    if (missed) sentences.push(t("verdict_missed", { count: missed }));
    verdict.textContent = sentences.join(" ");
    announce(verdict.textContent);
  }

  function drawAll() {
    const passed = run.lasted ?? (run.began ? Math.min(seconds, (performance.now() - run.began) / 1000) : 0);
    progress.value = passed;
    counters.replaceChildren(...cards(run));
    const atEnd = frame.scrollLeft;
    frame.replaceChildren(run.began ? timeline(run, edges, Math.max(LEAST_WIDTH, frame.clientWidth), passed, seconds) : waiting());
    // A narrow window follows what happens now.
    frame.scrollLeft = run.began && !run.isOver
      ? LEFT + (passed / seconds) * (LEAST_WIDTH - LEFT) - frame.clientWidth + 40 : atEnd;
  }

  // Keep the names of both halves visible when the picture is scrolled sideways.
  function keepNamesInView() {
    for (const name of frame.querySelectorAll(".prove-group")) name.setAttribute("x", frame.scrollLeft + 10);
  }

  function fillNumbers() {
    numbers.querySelector(".prove-table")?.remove();
    if (numbers.open) numbers.append(tableOf(run, edges));
  }

  main.replaceChildren(
    head(),
    element("p", { class: "prove-lead" }, t("lead", { seconds })),
    element("div", { class: "prove-row" }, button, progress, reached),
    message, counters, verdict, frame, legend(), numbers,
    element("section", { class: "prove-how" },
      element("h2", {}, t("how")),
      element("ul", {}, ["how_stale", "how_computed", "how_row"].map((key) =>
        element("li", {}, t(key, { ttl: TTL_S }))))));
  drawAll();
}

function head() {
  return element("div", { class: "view-head" }, element("h1", {}, t("title")));
}

function newRun() {
  return { writes: [], reads: [], began: 0, isOver: false };
}

// Without the list, the page reads through the edge that it reaches.
function edgesOf({ edges, this: own }) {
  if (!edges.length) return [{ name: t("this_edge"), path: (path) => path }];
  return edges.map(({ id, name }) => ({ name, isOwn: id === own, path: (path) => `/console/through/${id}${path}` }))
    .sort((one, other) => one.name.localeCompare(other.name, undefined, { numeric: true }));
}

function totals(run) {
  const judged = run.reads.filter((read) => read.aside);
  return {
    judged: judged.length,
    missed: run.reads.length - judged.length,
    stale: judged.filter((read) => read.isStale).length,
    aside: judged.filter((read) => read.aside.isStale).length,
    fast: judged.filter((read) => read.tier !== "postgres").length,
    asideFast: judged.filter((read) => read.aside.tier !== "postgres").length,
    writes: run.writes.filter((write) => write.done !== null && !write.failed).length,
  };
}

function cards(run) {
  const { judged, stale, aside, fast, asideFast, writes } = totals(run);
  const share = (part) => (judged ? t("percent", { value: number(100 * part / judged, 1) }) : "–");
  const card = (kind, title, note, count, cached) => element("div", { class: `surface prove-card prove-card-${kind}`,
    id: `prove-${kind}` },
  element("h2", {}, title, element("span", { class: "prove-note" }, note)),
  element("p", { class: "prove-count" },
    element("span", { class: `prove-number ${count ? "prove-number-bad" : ""}` }, judged ? number(count) : "–"),
    element("span", {}, t("stale_answers", { count: judged ? count : 0 }), judged && count ? ` (${share(count)})` : "")),
  element("p", { class: "prove-small" }, t("of_reads", { count: judged }), " · ", t("from_cache", { share: share(cached) })));
  return [
    card("velikiy", "Velikiy Flask", t("measured"), stale, fast),
    card("aside", t("aside", { ttl: TTL_S }), t("computed"), aside, asideFast),
    element("div", { class: "surface prove-card", id: "prove-writes" },
      element("h2", {}, t("writes")),
      element("p", { class: "prove-count" }, element("span", { class: "prove-number" }, number(writes)),
        element("span", {}, t("acknowledged", { count: writes }))),
      element("p", { class: "prove-small" }, t("mean_write", { value: meanWrite(run) }))),
  ];
}

function meanWrite(run) {
  const times = run.writes.filter((write) => write.version > 1 && write.done).map((write) => write.done - write.sent);
  return times.length ? milliseconds(1000 * times.reduce((sum, time) => sum + time, 0) / times.length) : "–";
}

function waiting() {
  return element("div", { class: "state" }, element("p", {}, t("waiting")));
}

// ---- the picture ----

function timeline(run, edges, width, passed, span) {
  const group = HEAD + edges.length * LANE;
  const height = TOP + 2 * group + GAP + AXIS;
  const bottom = height - AXIS;
  const x = (seconds) => LEFT + (seconds / span) * (width - LEFT - RIGHT);
  const { stale, aside, judged, writes } = totals(run);
  const content = [
    svg("title", { id: "prove-picture-title" }, t("picture")),
    svg("desc", { id: "prove-picture-text" }, t("picture_text", { reads: judged, writes, stale, aside })),
  ];
  // The stretches in which a version is the newest, light and dark in turn.
  const acknowledged = run.writes.filter((write) => write.done !== null && !write.failed);
  acknowledged.forEach((write, n) => {
    const end = acknowledged[n + 1]?.done ?? passed;
    if (n % 2) {
      content.push(svg("rect", { class: "prove-stretch", x: x(write.done), y: TOP, height: bottom - TOP,
        width: Math.max(0, x(end) - x(write.done)) }));
    }
  });
  for (let second = 0; second <= span; second += span > 40 ? 10 : span > 10 ? 5 : 1) {
    content.push(svg("text", { class: "prove-mark", x: x(second), y: height - 5, "text-anchor": "middle" },
      t("seconds", { value: number(second) })));
  }
  const groups = [
    { y: TOP, title: "Velikiy Flask", note: t("measured"), of: (read) => read },
    { y: TOP + group + GAP, title: t("aside_short"), note: t("computed"), of: (read) => read.aside },
  ];
  for (const { y, title, note } of groups) {
    content.push(svg("text", { class: "prove-group", x: 10, y: y + 16 }, title, " ",
      svg("tspan", { class: "prove-group-note" }, note)));
    edges.forEach((edge, n) => {
      const middle = y + HEAD + n * LANE + LANE / 2;
      content.push(svg("line", { class: "prove-lane", x1: LEFT, x2: width - RIGHT, y1: middle, y2: middle }),
        svg("text", { class: "prove-edge", x: 10, y: middle + 4 }, shortened(edge.name)));
    });
  }
  for (const write of run.writes) {
    const done = write.done ?? passed;
    content.push(svg("g", { class: `prove-write ${write.failed ? "prove-write-failed" : ""}` },
      svg("title", {}, t("write_title", { version: String(write.version), value: milliseconds(1000 * (done - write.sent)) })),
      svg("line", { x1: x(done), x2: x(done), y1: TOP - 6, y2: bottom }),
      svg("text", { x: x(done), y: TOP - 10, "text-anchor": "middle" }, `v${write.version}`)));
  }
  for (const { y, of } of groups) {
    for (const read of run.reads) {
      const shown = of(read);
      const middle = y + HEAD + edges.indexOf(read.edge) * LANE + LANE / 2;
      content.push(mark(x(read.end), middle, read, shown));
    }
  }
  return svg("svg", { class: "prove-picture", width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-labelledby": "prove-picture-title prove-picture-text" }, content);
}

function shortened(name) {
  return name.length > 18 ? `${name.slice(0, 17)}…` : name;
}

// A dot; stale answers are crosses, so that colour is not the only sign.
function mark(x, y, read, shown) {
  if (!shown || read.version === null) return svg("circle", { class: "prove-missed", cx: x, cy: y, r: 3 });
  const about = svg("title", {}, t("read_title", { version: String(shown.version), tier: TIERS[shown.tier] ?? "–",
    value: milliseconds(1000 * (read.end - read.start)) }), shown.isStale ? ` ${t("read_stale")}` : "");
  if (shown.isStale) {
    return svg("path", { class: "prove-stale", d: `M${x - 3.5} ${y - 3.5}l7 7m0 -7l-7 7` }, about);
  }
  return svg("circle", { class: `prove-read prove-${shown.tier ?? "postgres"}`, cx: x, cy: y, r: 3.2 }, about);
}

function legend() {
  const dot = (name, text) => element("span", { class: "prove-key" },
    svg("svg", { width: 12, height: 12, "aria-hidden": "true" }, svg("circle", { class: `prove-read prove-${name}`, cx: 6, cy: 6, r: 4 })), text);
  return element("p", { class: "prove-legend" },
    element("span", { class: "prove-key" }, svg("svg", { width: 12, height: 14, "aria-hidden": "true", class: "prove-write" },
      svg("line", { x1: 6, x2: 6, y1: 0, y2: 14 })), t("legend_write")),
    dot("nginx", t("legend_read", { tier: "Nginx" })), dot("redis", "Redis"), dot("postgres", "PostgreSQL"),
    element("span", { class: "prove-key" }, svg("svg", { width: 12, height: 12, "aria-hidden": "true" },
      svg("path", { class: "prove-stale", d: "M2 2l8 8m0 -8l-8 8" })), t("legend_stale")));
}

function tableOf(run, edges) {
  const count = (edge, test) => number(run.reads.filter((read) => read.edge === edge && test(read)).length);
  const tier = (name) => (read) => read.version !== null && read.tier === name;
  const columns = [["reads", (read) => read.version !== null], ["Nginx", tier("nginx")], ["Redis", tier("redis")],
    ["PostgreSQL", tier("postgres")], ["stale", (read) => read.isStale], ["aside_stale", (read) => read.aside?.isStale],
    ["missed", (read) => read.version === null]];
  const title = (name) => (/^[A-Z]/.test(name) ? name : t(`table_${name}`));
  return element("div", { class: "surface prove-table", tabIndex: 0, role: "region", "aria-label": t("numbers") },
    element("table", { class: "table" },
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, t("table_edge")),
        columns.map(([name]) => element("th", { scope: "col" }, title(name))))),
      element("tbody", {}, edges.map((edge) => element("tr", {}, element("th", { scope: "row" }, edge.name),
        columns.map(([, test]) => element("td", {}, count(edge, test))))))));
}
