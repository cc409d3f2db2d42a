// The entries of each tier for one path, with a read and a purge.

import * as api from "./api.js";
import { TIERS, badge } from "./badge.js";
import { announce, element } from "./dom.js";
import { rights } from "./rights.js";
import { explain, loading } from "./states.js";
import { number, translator } from "./texts.js";
import { texts } from "./texts/user.js";

const t = translator(texts);
const MAX_READS = 8;

// Adds the section, and returns { refresh }.
//
// read: reads the path, and returns the answer. exists: returns whether there is a row.
export function showTiers(main, { path, read, exists, signal }) {
  const stages = element("ol", { class: "stages" }, element("li", { class: "stage" }, loading()));
  const reads = element("ol", { class: "tier-reads", "aria-label": t("reads") });
  const problem = element("p", { class: "tiers-problem", role: "alert" });
  const button = element("button", { type: "button", class: "btn btn-primary read-again", onclick: readAgain }, t("read"));
  const purges = [["all", "purge"], ["nginx", "purge_nginx"]].map(([tier, text]) =>
    element("button", { type: "button", class: `btn btn-outline-secondary purge-${tier}`, title: t(`${text}_title`),
      onclick: () => purge(tier) }, t(text)));
  main.append(element("section", { class: "surface card-pad", "aria-labelledby": "tiers-title" },
    element("div", { class: "section-head" },
      element("h2", { id: "tiers-title" }, t("tiers")),
      element("code", { class: "path" }, path)),
    element("p", { class: "explanation" }, t("tiers_text")),
    stages,
    element("div", { class: "tiers-actions" }, button, purges, reads),
    problem));
  const drawRights = () => { for (const each of purges) each.disabled = !rights().may_write; };
  let isRefused = false;
  addEventListener("rightschange", () => {
    drawRights();
    if (isRefused) refresh();
  }, { signal });
  drawRights();

  async function refresh() {
    const answer = await api.request("GET", `/console/tiers?path=${encodeURIComponent(path)}`,
      { signal, asks: false }); // the fields and the history may be readable without a key
    if (answer.aborted) return;
    isRefused = answer.status === 401;
    problem.textContent = answer.ok ? "" : explain(answer.problem);
    if (answer.ok) stages.replaceChildren(...answer.body.tiers.map((tier) => stage(tier, exists())));
    else if (!stages.querySelector(".tier-title")) stages.replaceChildren();
  }

  async function readAgain() {
    button.disabled = true;
    const answer = await read();
    button.disabled = false;
    if (answer.aborted) return;
    problem.textContent = answer.ok || answer.status === 404 ? "" : explain(answer.problem);
    if (answer.source.tier) note(badge(answer.source), TIERS[answer.source.tier]);
    await refresh();
  }

  async function purge(tier) {
    const answer = await api.request("POST", "/console/purge", { body: { path, tier } });
    if (signal.aborted) return;
    problem.textContent = answer.ok ? "" : explain(answer.problem);
    if (answer.ok) note(element("span", { class: "tier purged" }, t("purged")), t("purged"));
    await refresh();
  }

  function note(shown, text) {
    reads.append(element("li", {}, shown));
    while (reads.children.length > MAX_READS) reads.firstElementChild.remove();
    announce(text);
  }

  return { refresh };
}

function stage(tier, exists) {
  const kind = tier.tier.startsWith("edge") ? "nginx" : tier.tier;
  const address = tier.tier.startsWith("edge ") ? tier.tier.slice(5) : "";
  const { state, lines, isHolding } = describe(kind, tier, exists);
  return element("li", { class: `stage stage-${kind}${isHolding ? " holds" : ""}`, dataset: { tier: kind } },
    element("div", { class: "tier-title" },
      element("span", { class: "tier-dot", "aria-hidden": "true" }), TIERS[kind],
      address && element("span", { class: "tier-address" }, address)),
    element("div", { class: "tier-state" }, state),
    lines.map((line) => element("div", { class: "tier-line" }, line)));
}

// Returns the state in a few words, and further lines.
function describe(kind, tier, exists) {
  if (kind === "postgres") {
    return { state: t(exists ? "the_row" : "no_row"), isHolding: exists, lines: [t(tier.writer_in_flight ? "writer" : "no_writer")] };
  }
  const fence = tier.fenced ? [t("fenced")] : [];
  if (!tier.answers) return { state: t("no_answer"), isHolding: false, lines: fence };
  const lines = [...fence];
  if (kind === "redis") {
    const sizes = Object.values(tier.entries);
    if (tier.leases.length) lines.push(t("fill_lease"));
    if (!sizes.length) return { state: t("nothing"), isHolding: false, lines };
    lines.unshift(t("age", { age: seconds(tier.age) }));
    return { state: t("bytes", { count: sizes.reduce((sum, size) => sum + size, 0) }), isHolding: true, lines };
  }
  lines.push(tier.lease ? t("lease", { lease: seconds(tier.lease) }) : t("no_lease"));
  if (tier.bytes === null) return { state: t("nothing"), isHolding: false, lines };
  lines.unshift(t("age", { age: seconds(tier.age) }));
  return { state: t("bytes", { count: tier.bytes }), isHolding: true, lines };
}

function seconds(value) {
  return number(value, 1);
}
