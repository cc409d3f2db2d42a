// The common parts of the forms of a user: the fields, the refusals beside them, and a save over the version that was read.

import { request } from "./api.js";
import { openDialog } from "./dialogs.js";
import { element } from "./dom.js";
import { reason } from "./states.js";
import { moment, translator } from "./texts.js";
import { texts } from "./texts/users.js";

const t = translator(texts);

export const FIELDS = ["name", "email"];

// Shows the errors of a refusal beside their fields, and focuses the first field. Returns whether a field has an error.
//
// inputs, places: the input of each field, and the element below it.
export function showFieldProblems(errors, inputs, places) {
  let first = null;
  for (const field of FIELDS) {
    const own = (errors ?? []).filter((error) => error.field === field).map(({ detail }) => reason(detail));
    places[field].textContent = own.length ? t("field_problem", { field: t(field), detail: own.join("; ") }) : "";
    inputs[field].classList.toggle("is-invalid", own.length > 0);
    inputs[field].setAttribute("aria-invalid", String(own.length > 0));
    if (own.length) first ??= inputs[field];
  }
  first?.focus();
  return first !== null;
}

// Saves what the person entered, if the user is still as it was read. Otherwise the person decides.
//
// seen: { row, etag, source } of the read that the person saw. mine: the fields as entered.
// Returns { end, row, etag, source, problem }, with the user as this function last read it. end: "saved"; "theirs", where
// row is null if the user was deleted; or "open": nothing was saved, because of `problem` or because the person goes on.
export async function saveOver(seen, mine) {
  const path = `/users/${seen.row.id}`;
  for (;;) {
    const changes = Object.fromEntries(FIELDS.filter((field) => mine[field] !== seen.row[field])
      .map((field) => [field, mine[field]]));
    if (!Object.keys(changes).length) return { end: "saved", ...seen };
    const answer = await request("PATCH", path, {
      body: changes,
      headers: { "If-Match": seen.etag, Prefer: "return=representation" },
    });
    if (answer.ok) return { end: "saved", ...seen, row: await stored(path, answer, { ...seen.row, ...mine }) };
    if (answer.status !== 412 && answer.status !== 404) return { end: "open", ...seen, problem: answer.problem };
    const now = await request("GET", path);
    if (!now.ok && now.status !== 404) return { end: "open", ...seen, problem: now.problem };
    const current = now.ok ? now.body : null;
    const read = { row: current, etag: now.headers.get("ETag"), source: now.source };
    // A save whose answer was lost, or another client that saved the same values.
    if (current && FIELDS.every((field) => current[field] === mine[field].trim())) return { end: "saved", ...read };
    const decision = await showConflict({ base: seen.row, current, mine });
    if (decision === "theirs") return { end: "theirs", ...read };
    if (current) seen = read;
    if (decision !== "mine") return { end: "open", ...seen };
    if (current) continue;
    const created = await request("PUT", path, { body: mine, headers: { "If-None-Match": "*" } });
    if (created.ok) return { end: "saved", ...seen, row: await stored(path, created, { ...seen.row, ...mine }) };
    if (created.status !== 412) return { end: "open", ...seen, problem: created.problem }; // 412: it is there again
  }
}

// Returns the user that was saved, also if a proxy has removed the preference for the whole row.
async function stored(path, answer, expected) {
  if (answer.body.version) return answer.body;
  const read = await request("GET", path);
  return read.ok ? read.body : expected;
}

// A lost race: another client has changed a user since the person began. The dialog shows both versions, and the person
// decides.
//
// Returns a promise of "mine", "theirs", or null if the person goes on editing.
//
// current: the user as it is now, null if it was deleted. mine: what the person wants; null for a deletion.
// base: the user as the person saw it.
export function showConflict({ base, current, mine }) {
  const title = current ? t("conflict_title") : t("conflict_deleted_title");
  const lead = current
    ? t(mine ? "conflict_text" : "conflict_delete_text", { when: moment(current.updated_at) })
    : t("conflict_deleted_text");
  const yours = mine ?? base;
  const line = (field) => {
    const differs = !current || current[field] !== yours[field];
    const cell = (value) => element("td", {}, differs ? element("strong", {}, value) : value);
    return element("tr", {}, element("th", { scope: "row" }, t(field)),
      cell(current ? current[field] : t("deleted_value")), cell(yours[field]));
  };
  const mineLabel = !mine ? t("conflict_delete") : current ? t("conflict_mine") : t("conflict_create");
  return openDialog(title, (close) => ({
    submit: () => close("mine"),
    body: [
      element("p", {}, lead),
      element("table", { class: "conflict" },
        element("thead", {}, element("tr", {}, element("td"), element("th", { scope: "col" }, t("conflict_now")),
          element("th", { scope: "col" }, t(mine ? "conflict_yours" : "conflict_seen")))),
        element("tbody", {}, FIELDS.map(line))),
    ],
    footer: [
      mine && element("button", { type: "button", class: "btn btn-outline-secondary me-auto",
        onclick: () => close(null) }, t("conflict_edit")),
      element("button", { type: "button", class: "btn btn-outline-secondary", onclick: () => close("theirs") },
        t(current ? "conflict_theirs" : "conflict_leave_deleted")),
      element("button", { type: "submit", class: mine ? "btn btn-primary" : "btn btn-danger" }, mineLabel),
    ],
  }), { wide: true });
}
