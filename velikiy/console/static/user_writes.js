// Creating and deleting users, and undoing a deletion.

import { randomHex, request } from "./api.js";
import { openDialog } from "./dialogs.js";
import { element } from "./dom.js";
import { explain, reason } from "./states.js";
import { translator } from "./texts.js";
import { texts } from "./texts/users.js";
import { toast } from "./toasts.js";
import { FIELDS, showConflict, showFieldProblems } from "./user_form.js";

const t = translator(texts);

const MAX_OPERATIONS = 1000; // of a batch
const AT_ONCE = 4; // requests of one undo

function cancelButton(close) {
  return element("button", { type: "button", class: "btn btn-outline-secondary", onclick: () => close(null) },
    t("cancel"));
}

function changed() {
  dispatchEvent(new Event("userschange"));
}

// ---- create ----

// What was typed into the form for a new user, if it was closed without a result.
const draft = { name: "", email: "" };

export async function createUser() {
  const created = await openDialog(t("create"), (close) => {
    const inputs = {};
    const problems = {};
    for (const field of FIELDS) {
      problems[field] = element("div", { class: "field-problem", id: `new-${field}-problem` });
      inputs[field] = element("input", { class: "form-control", id: `new-${field}`, value: draft[field],
        autocomplete: "off", spellcheck: false, "aria-describedby": `new-${field}-problem`,
        oninput: () => { draft[field] = inputs[field].value; } });
    }
    const message = element("div", { class: "field-problem", role: "alert" });
    const save = element("button", { type: "submit", class: "btn btn-primary" }, t("create_save"));
    // A request that is sent again after its answer was lost must not create a second user.
    let sent = { text: "", key: "" };
    const submit = async () => {
      if (save.disabled) return;
      const body = Object.fromEntries(FIELDS.map((field) => [field, inputs[field].value]));
      const text = JSON.stringify(body);
      if (sent.text !== text) sent = { text, key: randomHex() };
      save.disabled = true;
      message.textContent = "";
      const answer = await request("POST", "/users", { body: text,
        headers: { "Content-Type": "application/json", "Idempotency-Key": sent.key } });
      save.disabled = false;
      if (answer.ok) return close({ ...body, id: answer.body.id });
      if (answer.status < 500 && answer.status !== 0) sent = { text: "", key: "" };
      if (!showFieldProblems(answer.problem.errors, inputs, problems)) message.textContent = explain(answer.problem);
      return undefined;
    };
    const fields = FIELDS.map((field) => element("div", { class: "mb-3" },
      element("label", { class: "form-label", for: `new-${field}` }, t(field)), inputs[field], problems[field]));
    return {
      submit,
      body: [fields, message],
      footer: [
        cancelButton(close),
        save,
      ],
    };
  });
  if (!created) return;
  draft.name = draft.email = "";
  toast(t("created", { name: created.name.trim() }));
  changed();
}

// ---- delete ----

// Returns whether a write without a good answer may have been carried out all the same.
function isUnknown({ status }) {
  return status === 0 || status >= 500;
}

// Deletes a user as the person saw it. If the user has changed since, the person decides again.
//
// isRepeated: an earlier deletion may have been carried out. So a user that is gone was deleted here.
export async function deleteUser(row, isRepeated = false) {
  let seen = row;
  for (;;) {
    const now = await request("GET", `/users/${row.id}`);
    if (now.status === 404) return alreadyGone(seen, isRepeated);
    if (!now.ok) return deletionFailed(now.problem, seen, isRepeated);
    if (now.body.version !== seen.version) {
      if (await showConflict({ base: seen, current: now.body, mine: null }) !== "mine") return changed();
      seen = now.body;
    }
    const answer = await request("DELETE", `/users/${row.id}`, { headers: { "If-Match": now.headers.get("ETag") } });
    if (answer.ok) {
      offerUndo([now.body]);
      return changed();
    }
    if (answer.status === 404) return alreadyGone(seen, isRepeated);
    if (answer.status !== 412) return deletionFailed(answer.problem, seen, isRepeated || isUnknown(answer));
  }
}

function alreadyGone(row, isRepeated) {
  if (isRepeated) offerUndo([row]);
  else toast(t("was_deleted", { name: row.name }));
  changed();
}

function deletionFailed(problem, row, mayBeDone) {
  toast(`${t(mayBeDone ? "maybe_deleted" : "not_deleted", { name: row.name })} ${explain(problem)}`,
    { kind: "failed", action: { label: t("retry"), run: () => deleteUser(row, mayBeDone) } });
}

// Deletes many users after a question. Returns the ids that are gone; the others are listed with their reasons.
export async function deleteUsers(rows) {
  const confirmed = await openDialog(t("delete_many_title", { count: rows.length }), (close) => ({
    submit: () => close(true),
    body: [element("p", {}, t("delete_many_text")),
      element("ul", { class: "name-list" },
        rows.slice(0, 8).map((row) => element("li", {}, `${row.name} (${row.email})`)),
        rows.length > 8 && element("li", {}, t("and_more", { count: rows.length - 8 })))],
    footer: [
      cancelButton(close),
      element("button", { type: "submit", class: "btn btn-danger" }, t("delete")),
    ],
  }));
  if (!confirmed) return [];
  const deleted = [];
  const missing = [];
  const refused = [];
  let problem = null;
  let unknown = []; // the rows of a batch whose answer was lost twice
  for (let start = 0; start < rows.length && !problem; start += MAX_OPERATIONS) {
    let part = rows.slice(start, start + MAX_OPERATIONS);
    const key = randomHex();
    let tries = 0;
    while (part.length) {
      const body = { operations: part.map(({ id }) => ({ op: "delete", id })) };
      const options = { body, timeout: 60_000, headers: { "Idempotency-Key": `${key}-${tries}` } };
      let answer = await request("POST", "/users/batch", options);
      // The key lets the batch happen once, and the second answer shows its outcome.
      if (isUnknown(answer)) answer = await request("POST", "/users/batch", options);
      if (answer.ok) {
        deleted.push(...part);
        break;
      }
      // A batch is all or nothing: the rows at fault are left out, and the others deleted.
      const faults = new Map((answer.problem.errors ?? []).filter(({ index }) => index !== undefined)
        .map((error) => [error.index, error]));
      if (!faults.size || ++tries > 3) {
        problem = answer.problem;
        if (isUnknown(answer)) unknown = part;
        break;
      }
      for (const [index, error] of faults) {
        if (error.status === 404) missing.push(part[index]);
        else refused.push({ row: part[index], detail: reason(error.detail) });
      }
      part = part.filter((_, index) => !faults.has(index));
    }
  }
  if (deleted.length) offerUndo(deleted);
  if (missing.length) toast(t("were_deleted", { count: missing.length }));
  if (problem || refused.length) await showResults({ deleted, missing, refused, unknown, problem, all: rows });
  changed();
  return [...deleted, ...missing].map(({ id }) => id);
}

function showResults({ deleted, missing, refused, unknown, problem, all }) {
  const gone = new Set([...deleted, ...missing].map(({ id }) => id));
  const reasons = new Map(refused.map(({ row, detail }) => [row.id, detail]));
  for (const { id } of unknown) reasons.set(id, t("not_known"));
  const kept = all.filter(({ id }) => !gone.has(id));
  const title = t(unknown.length ? "results_title_unknown" : "results_title", { count: unknown.length || kept.length });
  return openDialog(title, (close) => ({
    submit: () => close(true),
    body: [problem && element("p", {}, explain(problem)),
      element("ul", { class: "name-list" }, kept.slice(0, 100).map((row) =>
        element("li", {}, reasons.has(row.id) ? `${row.name}: ${reasons.get(row.id)}` : row.name)))],
    footer: [element("button", { type: "submit", class: "btn btn-primary" }, t("close"))],
  }));
}

// ---- undo ----

// The users that were deleted and can be brought back: their ids only, and only in this tab. A message that a reload
// has taken away is shown again.
const KEPT = "deleted";
const MAX_KEPT = 20;

function keptIds() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
  } catch {
    return [];
  }
}

function keep(lists) {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(lists.slice(-MAX_KEPT)));
  } catch {
    // The message is there until the page is left.
  }
}

const offered = new Set();

function offerUndo(rows) {
  const ids = rows.map(({ id }) => id);
  keep([...keptIds(), ids]);
  showUndo(ids, rows);
}

// Shows the messages of deletions before the page was loaded again.
export function offerUndoAgain() {
  for (const ids of keptIds()) if (!offered.has(String(ids))) showUndo(ids, null);
}

function showUndo(ids, rows) {
  offered.add(String(ids));
  const forget = () => {
    keep(keptIds().filter((each) => String(each) !== String(ids)));
    offered.delete(String(ids));
  };
  const text = ids.length > 1 ? t("deleted_many", { count: ids.length })
    : rows ? t("deleted", { name: rows[0].name }) : t("deleted_id", { id: String(ids[0]) });
  toast(text, { action: { label: t("undo"), run: () => undo(ids, rows, forget) }, onclose: forget });
}

async function undo(ids, rows, forget) {
  const waiting = ids.map((id, index) => ({ id, row: rows?.[index] ?? null }));
  const failures = [];
  let restored = 0;
  let name = "";
  const work = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) {
      const row = next.row ?? await lastVersion(next.id);
      const answer = row?.problem ? row : await request("PUT", `/users/${next.id}`, {
        body: { name: row.name, email: row.email }, headers: { "If-None-Match": "*" } });
      if (answer.ok || answer.status === 412) { // 412: the user is there again
        restored += 1;
        name = row.name;
      } else failures.push({ ...next, problem: answer.problem });
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  forget();
  if (restored) toast(restored > 1 ? t("restored_many", { count: restored }) : t("restored", { name }));
  if (failures.length) {
    const again = failures.map(({ id }) => id);
    const text = `${t("not_restored", { count: failures.length })} ${explain(failures[0].problem)}`;
    keep([...keptIds(), again]);
    toast(text, { kind: "failed", action: { label: t("retry"), run: () => undo(again, failures.map(({ row }) => row),
      () => keep(keptIds().filter((each) => String(each) !== String(again)))) } });
  }
  changed();
}

// Returns the user as it was before its deletion, or the failed answer.
async function lastVersion(id) {
  const answer = await request("GET", `/users/${id}/history?limit=2`);
  if (!answer.ok) return answer;
  return answer.body.find(({ row }) => row)?.row ?? { problem: { status: 404, errors: [] }, status: 404 };
}
