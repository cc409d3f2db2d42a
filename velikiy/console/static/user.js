// The view of one user: the fields, where each tier has them, and the history.

import * as api from "./api.js";
import { badge } from "./badge.js";
import { showConflict } from "./conflicts.js";
import { announce, element, icon, set } from "./dom.js";
import { showHistory } from "./history.js";
import { rights } from "./rights.js";
import { empty, explain, failed, loading } from "./states.js";
import { moment, translator } from "./texts.js";
import { texts } from "./texts/user.js";
import { showTiers } from "./tiers.js";
import { toast } from "./toasts.js";
import { deleteUser } from "./user_writes.js";

const t = translator(texts);
const FIELDS = ["name", "email"];
const TYPES = { name: "text", email: "email" };
const LIMITS = { name: 100, email: 254 };
const REPRESENTATION = { Prefer: "return=representation" };

export async function show(main, { parameters: [id], signal }) {
  const path = `/users/${id}`;
  let row = null;
  let etag = "";

  const heading = element("h1", { class: "user-name" }, t("user", { id }));
  const source = element("span", { class: "user-source" });
  const fields = element("div", {}, loading());
  main.append(
    element("a", { class: "back", href: "#/users" }, icon("previous"), t("all_users")),
    element("div", { class: "view-head" }, heading, source),
    element("section", { class: "surface card-pad", "aria-label": t("fields") }, fields));
  const tiers = showTiers(main, { path, read, exists: () => row !== null, signal });
  const history = showHistory(main, { id, path, current: () => row && { row, etag }, changed: () => load(), signal });
  addEventListener("rightschange", () => drawRights(), { signal });
  addEventListener("userschange", () => load(), { signal }); // deleted, or brought back

  // Reads the user, as the button "Read" does. Returns the answer.
  async function read() {
    const answer = await api.request("GET", path, { signal });
    if (!answer.aborted) source.replaceChildren(badge(answer.source));
    return answer;
  }

  async function load() {
    const answer = await read();
    if (answer.aborted) return;
    if (answer.ok) {
      take(answer.body, answer.headers.get("ETag"));
    } else if (answer.status === 404) {
      row = null;
      heading.textContent = t("user", { id });
      fields.replaceChildren(empty(t("missing"), t("missing_text")));
    } else {
      fields.replaceChildren(failed(answer.problem, load));
    }
    await Promise.all([tiers.refresh(), history.refresh()]);
  }

  function take(newRow, newEtag) {
    row = newRow;
    etag = newEtag;
    heading.textContent = row.name;
    document.title = `${row.name} – Velikiy Flask`;
    drawForm();
  }

  // ---- the form ----

  let form = null;
  let entered = null; // what is in the fields, until it is saved

  function drawForm() {
    entered = Object.fromEntries(FIELDS.map((name) => [name, row[name]]));
    const inputs = FIELDS.map((name) => element("div", { class: "field" },
      element("label", { class: "form-label", for: `user-${name}` }, t(name)),
      element("input", { class: "form-control", id: `user-${name}`, name, type: "text", inputMode: TYPES[name],
        value: row[name], maxLength: LIMITS[name], autocomplete: "off", spellcheck: false,
        "aria-describedby": `user-${name}-problem`, oninput: changed }),
      element("div", { class: "invalid-feedback", id: `user-${name}-problem` })));
    form = element("form", { class: "user-form", noValidate: true, onsubmit: (event) => {
      event.preventDefault();
      save(etag);
    } },
      inputs,
      element("div", { class: "form-problem", role: "alert" }),
      element("div", { class: "form-actions" },
        element("button", { type: "submit", class: "btn btn-primary", disabled: true }, t("save")),
        element("button", { type: "button", class: "btn btn-outline-secondary undo", disabled: true,
          onclick: () => { drawForm(); form.elements.name.focus(); } }, t("discard")),
        element("button", { type: "button", class: "btn btn-outline-danger delete", onclick: () => deleteUser(row) }, t("delete"))));
    const facts = element("dl", { class: "facts" },
      fact(t("id"), String(row.id)), fact(t("version"), String(row.version)),
      fact(t("created_at"), time(row.created_at)), fact(t("updated_at"), time(row.updated_at)));
    fields.replaceChildren(form, facts);
    drawRights();
  }

  function changed() {
    for (const name of FIELDS) entered[name] = form.elements[name].value;
    const isChanged = FIELDS.some((name) => entered[name] !== row[name]);
    form.querySelector("[type=submit]").disabled = !isChanged || !rights().may_write;
    form.querySelector(".undo").disabled = !isChanged;
  }

  function drawRights() {
    if (!form) return;
    const mayWrite = rights().may_write;
    for (const name of FIELDS) form.elements[name].readOnly = !mayWrite;
    form.querySelector(".delete").disabled = !mayWrite;
    changed();
  }

  function showProblem(problem) {
    let first = null;
    for (const name of FIELDS) {
      const own = problem?.errors.filter((error) => error.field === name) ?? [];
      const input = form.elements[name];
      set(input, { "aria-invalid": own.length ? "true" : null });
      input.classList.toggle("is-invalid", own.length > 0);
      form.querySelector(`#user-${name}-problem`).textContent = own.map((error) => error.detail).join("; ");
      if (own.length) first ??= input;
    }
    form.querySelector(".form-problem").textContent = problem && !first ? explain(problem) : "";
    first?.focus();
  }

  // Saves what was entered, over the version with this ETag.
  async function save(over) {
    const changes = Object.fromEntries(FIELDS.filter((name) => entered[name] !== row[name])
      .map((name) => [name, entered[name]]));
    if (!Object.keys(changes).length) return;
    showProblem(null);
    const button = form.querySelector("[type=submit]");
    button.disabled = true;
    const answer = await api.request("PUT", path, { body: changes, headers: { "If-Match": over, ...REPRESENTATION } });
    if (signal.aborted) return;
    button.disabled = false;
    if (answer.status === 412 || answer.status === 404) {
      await decide();
    } else if (answer.ok) {
      toast(t("saved"));
      await load();
    } else {
      showProblem(answer.problem); // what was entered stays in the fields
    }
  }

  // Another client was faster: shows both versions, and saves over theirs, takes theirs, or goes on with the form.
  async function decide() {
    const answer = await api.request("GET", path, { signal });
    if (answer.aborted) return;
    if (!answer.ok && answer.status !== 404) {
      showProblem(answer.problem);
      return;
    }
    const current = answer.ok ? answer.body : null;
    const decision = await showConflict({ base: row, current, mine: { ...entered } });
    if (signal.aborted) return;
    if (decision === "theirs") {
      await load();
      return;
    }
    if (current) {
      row = current;
      etag = answer.headers.get("ETag");
      changed();
      if (decision === "mine") await save(etag);
    } else if (decision === "mine") {
      const created = await api.request("PUT", path, { body: entered, headers: { "If-None-Match": "*" } });
      if (created.ok) await load();
      else showProblem(created.problem);
    }
  }

  await load();
  if (row) announce(row.name);
}

function fact(name, value) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value));
}

function time(text) {
  return element("time", { dateTime: text, title: text }, moment(text));
}
