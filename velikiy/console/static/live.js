// Live: what the service did in the last 15 minutes, and how its parts are.

import { timeChart } from "./charts.js";
import { element, icon } from "./dom.js";
import { edgesFor } from "./states.js";
import { follow } from "./stream.js";
import { language, milliseconds, moment, number, translator } from "./texts.js";
import { texts } from "./texts/live.js";

const t = translator(texts);

const SPAN_S = 900;
// The order of a sample's members (velikiy/relay/live.py).
const AT = { moment: 0, nginx: 1, redis: 2, postgres: 3, stale: 4, write: 5, failed: 6, other: 7,
  quantiles: { nginx: 8, redis: 11, postgres: 14, drops: 17 }, drops: 20, outside: 21 };
const FAST_MS = 1; // the first bucket: edge/lua/metrics.lua counts an answer out of memory as 0

export async function show(main, context) {
  const { signal } = context;
  if (!await edgesFor(main, heading(), context, () => show(main, context))) return;
  const view = draw();
  main.replaceChildren(...view.content);
  let samples = [];
  follow({
    signal,
    event({ samples: newer, state, silent_s: silent }) {
      const newest = samples.at(-1)?.[AT.moment] ?? 0;
      samples = [...samples, ...newer.filter((sample) => sample[AT.moment] > newest)];
      const end = samples.at(-1)?.[AT.moment] ?? 0;
      samples = samples.filter((sample) => sample[AT.moment] > end - SPAN_S);
      view.update(samples, state, silent);
    },
    broken: (status) => view.broken(status),
  });
  signal.addEventListener("abort", () => view.end());
}

function heading(...more) {
  return element("div", { class: "view-head" }, element("h1", {}, t("title")), more);
}

function draw() {
  const pulse = element("span", { class: "live-pulse", role: "status" }, t("connecting"));
  const notes = element("div", { class: "live-notes" });
  const figures = element("dl", { class: "live-figures" });
  const findings = element("div", { class: "live-findings" });
  const parts = element("tbody");
  const charts = makeCharts();
  const chartArea = element("div", { class: "live-charts" }, charts.map(({ figure }) => figure));
  const without = element("p", { class: "live-note live-note-quiet", hidden: true }, t("metrics_off"));
  let drawn = "";

  function showPulse(name, text) {
    pulse.className = `live-pulse ${name}`;
    if (pulse.textContent !== text) pulse.textContent = text; // a screen reader says each change
  }

  function update(samples, state, silent) {
    const isSilent = silent !== 0;
    showPulse(isSilent ? "live-pulse-broken" : "live-pulse-on", isSilent ? t("old") : t("live"));
    notes.replaceChildren(...(isSilent ? [note(silent < 0 ? t("relay_never") : t("relay_silent", { seconds: silent }))] : []));
    if (state) {
      without.hidden = state.metrics;
      const found = JSON.stringify([state.findings, language()]);
      if (found !== drawn) findings.replaceChildren(...findingCards(state.findings)); // a screen reader does not repeat them
      drawn = found;
      parts.replaceChildren(...inOrder(state.parts).map((part) => partRow(part, state.at)));
    }
    chartArea.hidden = figures.hidden = Boolean(state && !state.metrics && !samples.length);
    figures.replaceChildren(...figureTiles(samples));
    for (const chart of charts) chart.update(samples);
  }

  function broken(status) {
    showPulse("live-pulse-broken", t("reconnecting"));
    notes.replaceChildren(note(status === 401 ? t("broken_401") : status === 429 ? t("broken_429") : t("broken")));
  }

  const content = [
    heading(pulse, element("p", { class: "live-lead" }, t("lead"))),
    notes,
    element("h2", { class: "visually-hidden" }, t("findings")), findings,
    figures,
    without,
    chartArea,
    element("h2", { class: "live-subtitle" }, t("parts")),
    element("div", { class: "surface live-parts" },
      element("table", { class: "table" },
        element("thead", {}, element("tr", {}, ["part", "state", "lease", "up", "restarts", "memory"].map((name) =>
          element("th", { scope: "col" }, t(`column_${name}`))))),
        parts)),
  ];
  findings.append(element("p", { class: "live-note live-note-quiet" }, t("no_state")));
  return { content, update, broken, end: () => charts.forEach((chart) => chart.end()) };
}

function note(text) {
  return element("p", { class: "live-note", role: "status" }, icon("alert"), text);
}

// ---- the pictures ----

function rate(value) {
  return number(value, value < 10 ? 1 : 0);
}

function duration(value) {
  if (value <= FAST_MS) return t("below", { value: number(FAST_MS) });
  return value >= 1000 ? t("seconds", { value: number(value / 1000, 1) }) : t("milliseconds", { value: milliseconds(value) });
}

function at(seconds, isShort) {
  const style = { hour: "2-digit", minute: "2-digit", ...(isShort ? {} : { second: "2-digit" }), hourCycle: "h23" };
  return new Intl.DateTimeFormat(language(), style).format(new Date(seconds * 1000));
}

function reads(sample) {
  return sample[AT.nginx] + sample[AT.redis] + sample[AT.postgres] + sample[AT.stale];
}

function hitRatio(sample) {
  const all = reads(sample);
  return all ? 100 * (sample[AT.nginx] + sample[AT.redis] + sample[AT.stale]) / all : null;
}

function makeCharts() {
  const common = { span: SPAN_S, at, texts: { table: t("as_table"), time: t("time") } };
  const rates = (key, series, more) => timeChart({ ...common, title: t(key), description: t(`${key}_text`), series,
    format: rate, ...more });
  const quantiles = (key, place, colour) => timeChart({ ...common, title: t(key), description: t(`${key}_text`),
    series: ["p50", "p95", "p99"].map((name, n) => ({ name, class: `${colour} line-${name}`,
      value: (sample) => sample[place + n] })),
    format: duration, scale: [1, 1000], height: 150 });
  const tier = (key, name) => ({ name, class: `series-${key}`, value: (sample) => sample[AT[key]] });
  const charts = [
    rates("answers", [tier("nginx", "Nginx"), tier("redis", "Redis"), tier("postgres", "PostgreSQL"),
      tier("stale", "STALE")], { stacked: true, height: 240 }),
    timeChart({ ...common, title: t("ratio"), description: t("ratio_text"),
      series: [{ name: t("ratio_series"), class: "series-nginx", value: hitRatio }],
      format: (value) => t("percent", { value: number(value, value > 99 && value < 100 ? 1 : 0) }), top: 100, limit: 100 }),
    rates("writes", [
      { name: t("writes_series"), class: "series-write", value: (sample) => sample[AT.write] },
      { name: t("outside_series"), class: "series-outside", value: (sample) => sample[AT.outside] },
      { name: t("failed_series"), class: "series-failed", value: (sample) => sample[AT.failed] },
    ]),
    quantiles("time_nginx", AT.quantiles.nginx, "series-nginx"),
    quantiles("time_redis", AT.quantiles.redis, "series-redis"),
    quantiles("time_postgres", AT.quantiles.postgres, "series-postgres"),
    quantiles("time_drops", AT.quantiles.drops, "series-write"),
  ];
  charts[0].figure.classList.add("chart-wide");
  charts[1].figure.classList.add("chart-half");
  charts[2].figure.classList.add("chart-half");
  return charts;
}

function figureTiles(samples) {
  const recent = samples.slice(-15); // 30 seconds: a single sample jumps
  const mean = (of) => recent.length ? recent.reduce((sum, sample) => sum + of(sample), 0) / recent.length : null;
  const answers = mean(reads), fromCache = mean((sample) => reads(sample) - sample[AT.postgres]);
  const newest = (place) => recent.map((sample) => sample[place]).filter((value) => value !== null).at(-1);
  const tile = (name, value) => element("div", { class: "surface live-figure", id: `live-${name}` },
    element("dt", {}, t(`figure_${name}`)), element("dd", {}, value));
  const known = (value, format) => value === null || value === undefined ? "–" : format(value);
  return [
    tile("answers", known(answers, (value) => t("per_second", { value: rate(value) }))),
    tile("ratio", answers ? t("percent", { value: number(100 * fromCache / answers, 1) }) : "–"),
    tile("writes", known(mean((sample) => sample[AT.write]), (value) => t("per_second", { value: rate(value) }))),
    tile("drops", known(newest(AT.quantiles.drops + 1), duration)),
    tile("outside", known(mean((sample) => sample[AT.outside]), (value) => t("per_second", { value: rate(value) }))),
    tile("failed", known(mean((sample) => sample[AT.failed]), (value) => t("per_second", { value: rate(value) }))),
  ];
}

// ---- what is wrong ----

// The sentences are those of ./run status and /readyz, in English.
function findingCards(found) {
  if (!found.length) return [element("p", { class: "live-finding live-finding-none" }, t("nothing_wrong"))];
  return [element("ul", {}, found.map((one) => {
    const isWrong = one.wrong !== false;
    return element("li", { class: `live-finding ${isWrong ? "live-finding-wrong" : "live-finding-warning"}` },
      icon("alert"),
      element("div", {},
        element("span", { class: "visually-hidden" }, isWrong ? t("wrong") : t("warning"), ": "),
        element("b", { lang: "en" }, one.where && !one.what.includes(one.where) ? `${one.where}: ` : "", one.what), " ",
        element("span", { lang: "en" }, one.advice),
        one.since ? element("span", { class: "live-since" }, " ", t("since", { time: moment(one.since * 1000) })) : null));
  }))];
}

// ---- the parts ----

const KINDS = ["edge", "app", "redis", "relay", "postgres"];
const FINE = new Set(["registered", "answers"]);

function inOrder(parts) {
  const place = (part) => KINDS.indexOf(part.kind);
  return [...parts].sort((one, other) => place(one) - place(other)
    || one.name.localeCompare(other.name, undefined, { numeric: true }));
}

function partRow(part, now) {
  const name = [t(`kind_${part.kind}`), part.name.replace(/^app(?=\d+$)/, "")].join(" ").trim();
  const state = part.kind === "redis" && part.state === "registered" ? "answers" : part.state;
  const fenced = part.fenced_since ? t("since", { time: moment(part.fenced_since * 1000) }) : "";
  const cell = (key, ...content) => element("td", { class: content[0] === "–" ? "live-none" : null,
    dataset: { label: t(`column_${key}`) } }, content);
  const lease = part.kind !== "edge" || !part.answers ? "–"
    : part.lease_ms ? t("seconds", { value: number(part.lease_ms / 1000, 1) }) : t("no_lease");
  return element("tr", { dataset: { kind: part.kind, state } },
    element("th", { scope: "row" }, name, details(part)),
    cell("state", element("span", { class: `live-state ${FINE.has(state) ? "live-state-fine" : "live-state-wrong"}` },
      t(`state_${state}`)), fenced && element("span", { class: "live-since" }, " ", fenced),
    state === "gone" && element("span", { class: "live-since" }, " ", t("since", { time: moment(part.seen * 1000) }))),
    cell("lease", lease),
    cell("up", part.started && part.answers ? age(now - part.started) : "–"),
    cell("restarts", number(part.restarts)),
    cell("memory", memory(part)));
}

function details(part) {
  let text = "";
  if (part.kind === "app" && part.workers) text = t("workers", { count: part.workers });
  if (part.kind === "postgres" && part.sessions) text = t("sessions", { used: part.sessions, most: part.max_sessions });
  return text && element("span", { class: "live-detail" }, text);
}

function memory(part) {
  if (!part.memory) return "–";
  const used = number(part.memory / 1e6);
  return part.max_memory ? t("memory_of", { used, most: number(part.max_memory / 1e6) }) : t("megabytes", { value: used });
}

function age(seconds) {
  if (seconds < 90) return t("seconds", { value: number(Math.max(0, seconds)) });
  if (seconds < 5400) return t("minutes", { value: number(seconds / 60) });
  return seconds < 172800 ? t("hours", { value: number(seconds / 3600) }) : t("days", { value: number(seconds / 86400) });
}
