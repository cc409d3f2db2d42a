// The history of a user: each version with what changed in it, and a way back to it.

import * as api from "./api.js";
import { badge } from "./badge.js";
import { element } from "./dom.js";
import { rights } from "./rights.js";
import { explain, failed, loading } from "./states.js";
import { moment, translator } from "./texts.js";
import { texts } from "./texts/user.js";
import { toast } from "./toasts.js";
import { FIELDS } from "./user_form.js";

const t = translator(texts);
const PAGE = 20;

// Adds the section, and returns { refresh }.
//
// current: returns { row, etag } of the present row, or null if there is none. changed: is called after a restore.
export function showHistory(main, { path, current, changed, signal }) {
  const list = element("ol", { class: "history" });
  const below = element("div", { class: "history-more" }, loading());
  const source = element("span");
  main.append(element("section", { class: "surface card-pad", "aria-labelledby": "history-title" },
    element("div", { class: "section-head" }, element("h2", { id: "history-title" }, t("history")), source),
    list, below));
  let items = [];
  let cursor = "";
  addEventListener("rightschange", draw, { signal });

  async function refresh() {
    items = [];
    cursor = "";
    await more();
  }

  async function more() {
    const query = new URLSearchParams({ ...(cursor && { cursor }), limit: String(PAGE) });
    const answer = await api.request("GET", `${path}/history?${query}`, { signal });
    if (answer.aborted) return;
    source.replaceChildren(badge(answer.source));
    if (answer.status === 404) {
      list.replaceChildren();
      below.replaceChildren(element("p", { class: "explanation" }, t("no_history")));
      return;
    }
    if (!answer.ok) {
      below.replaceChildren(failed(answer.problem, more));
      return;
    }
    items = [...items, ...answer.body];
    cursor = api.nextCursor(answer.headers);
    draw();
  }

  function draw() {
    const button = element("button", { type: "button", class: "btn btn-outline-secondary", onclick: more },
      t("older"));
    list.replaceChildren(...items.map((item, index) => drawItem(item, items[index + 1], index === 0)));
    below.replaceChildren(...(cursor ? [button] : []));
  }

  // before: the item of the version before it, if it is known.
  function drawItem(item, before, isFirst) {
    const canRestore = item.row && (!isFirst || !current());
    return element("li", { class: `history-item change-${item.change ?? "unknown"}` },
      element("div", { class: "history-head" },
        element("span", { class: "history-change" }, t(`change_${item.change ?? "unknown"}`)),
        element("span", { class: "history-version" }, t("version_n", { version: String(item.version) })),
        element("span", { class: "history-when" },
          element("time", { dateTime: item.changed_at, title: item.changed_at }, moment(item.changed_at)),
          author(item) && [" · ", author(item)]),
        canRestore && element("button", { type: "button", class: "btn btn-sm btn-outline-secondary restore",
          disabled: !rights().may_write, "aria-label": t("restore_n", { version: String(item.version) }),
          onclick: () => restore(item) }, t(current() ? "restore" : "bring_back"))),
      item.row && drawFields(item.row, before));
  }

  // Puts the row back as it was in this version: over the present row, or with the old id if it was deleted.
  async function restore(item) {
    const present = current();
    if (present && !differences(item.row, present.row).length) {
      toast(t("same_already"));
      return;
    }
    const body = Object.fromEntries(FIELDS.map((name) => [name, item.row[name]]));
    const condition = present ? { "If-Match": present.etag } : { "If-None-Match": "*" };
    const answer = await api.request("PUT", path, { body, headers: condition });
    if (signal.aborted) return;
    if (answer.status === 412) toast(t("changed_meanwhile"), { kind: "failed" });
    else if (!answer.ok) toast(sentence(answer.problem), { kind: "failed" });
    else toast(t("restored", { version: String(item.version) }));
    if (answer.ok || answer.status === 412) await changed();
  }

  return { refresh };
}

// Returns the names of the fields that differ.
function differences(one, other) {
  return FIELDS.filter((name) => one[name] !== other[name]);
}

function drawFields(row, before) {
  const older = before?.row;
  const changed = older ? differences(row, older) : FIELDS;
  if (!changed.length) return element("p", { class: "history-fields" }, t("no_difference"));
  return element("dl", { class: "history-fields" }, changed.map((name) => element("div", {},
    element("dt", {}, t(name)),
    element("dd", {},
      older && element("del", {}, older[name]),
      older ? element("ins", {}, row[name]) : row[name]))));
}

function author(item) {
  if (item.through === "api") return item.changed_by ? t("by_key", { name: item.changed_by }) : t("by_api");
  if (item.through === "sql") return t("by_sql", { name: item.changed_by ?? "" });
  if (item.through === "command") return item.changed_by ?? "";
  return "";
}

function sentence(problem) {
  const named = ({ field, detail }) => `${t(FIELDS.includes(field) ? field : "field")}: ${detail}`;
  return problem.errors.length ? problem.errors.map(named).join("; ") : explain(problem);
}
