// Editing a user in its row of the table. An edit stays open until it is saved or cancelled: other pages, other views
// and failed requests do not close it.

import { request } from "./api.js";
import { badge } from "./badge.js";
import { showConflict } from "./conflicts.js";
import { announce, element } from "./dom.js";
import { explain } from "./states.js";
import { translator } from "./texts.js";
import { texts } from "./texts/users.js";
import { toast } from "./toasts.js";

const t = translator(texts);

const FIELDS = ["name", "email"];

// The open edits by the id of their user.
export const openEdits = new Map();

addEventListener("beforeunload", (event) => {
  if ([...openEdits.values()].some((edit) => edit.isChanged)) event.preventDefault();
});

// Reads the user as it is now and opens its edit. Returns the row of the table, or null if it cannot be edited.
export async function beginEdit(row, { onend }) {
  const open = openEdits.get(row.id);
  if (open) return open.element;
  const answer = await request("GET", `/users/${row.id}`);
  if (answer.status === 404) {
    toast(t("was_deleted", { name: row.name }), { kind: "failed" });
    dispatchEvent(new Event("userschange"));
    return null;
  }
  if (!answer.ok) {
    toast(explain(answer.problem), { kind: "failed" });
    return null;
  }
  return new Edit(answer, onend).element;
}

class Edit {
  constructor(answer, onend) {
    this.row = answer.body;
    this.etag = answer.headers.get("ETag");
    this.onend = onend;
    openEdits.set(this.row.id, this);
    const { id } = this.row;
    this.inputs = {};
    this.problems = {};
    for (const field of FIELDS) {
      this.problems[field] = element("div", { class: "field-problem", id: `problem-${field}-${id}` });
      this.inputs[field] = element("input", { class: "form-control form-control-sm", id: `${field}-${id}`,
        value: this.row[field], spellcheck: false, autocomplete: "off", "aria-label": `${t(field)}: ${this.row.name}`,
        "aria-describedby": `problem-${field}-${id}` });
    }
    this.message = element("div", { class: "field-problem", role: "alert" });
    this.source = element("span", {}, badge(answer.source));
    this.save = element("button", { type: "button", class: "btn btn-sm btn-primary", id: `save-${id}`,
      onclick: () => this.send() }, t("save"));
    const cancel = element("button", { type: "button", class: "btn btn-sm btn-outline-secondary", id: `cancel-${id}`,
      onclick: () => this.end(null) }, t("cancel"));
    this.element = element("tr", { class: "editing", dataset: { id }, onkeydown: (event) => this.pressed(event) },
      element("td", { class: "column-choose" }),
      element("td", { class: "column-id" }, String(id)),
      element("td", { class: "column-name" }, this.inputs.name, this.problems.name, this.message),
      element("td", { class: "column-email" }, this.inputs.email, this.problems.email),
      element("td", { class: "column-edit", colSpan: 2 }, this.source, this.save, cancel));
  }

  get values() {
    return Object.fromEntries(FIELDS.map((field) => [field, this.inputs[field].value]));
  }

  get isChanged() {
    return FIELDS.some((field) => this.inputs[field].value !== this.row[field]);
  }

  pressed(event) {
    if (event.isComposing) return; // Enter and Escape belong to the input method
    if (event.key === "Enter" && event.target.matches("input")) {
      event.preventDefault();
      this.send();
    } else if (event.key === "Escape") {
      event.preventDefault();
      this.end(null);
    }
  }

  end(row) {
    openEdits.delete(this.row.id);
    this.onend(row ?? this.row);
  }

  async send() {
    if (this.save.disabled) return;
    if (!this.isChanged) return this.end(null);
    const mine = this.values;
    const differing = FIELDS.filter((name) => mine[name] !== this.row[name]);
    const changes = Object.fromEntries(differing.map((name) => [name, mine[name]]));
    this.save.disabled = true;
    this.explain({});
    const answer = await request("PATCH", `/users/${this.row.id}`, {
      body: changes,
      headers: { "If-Match": this.etag, Prefer: "return=representation" },
    });
    this.save.disabled = false;
    if (answer.ok) return this.saved(answer.body.version ? answer.body : null);
    if (answer.status === 412 || answer.status === 404) return this.decide(mine);
    return this.explain(answer.problem);
  }

  async saved(row) {
    const now = row ?? (await request("GET", `/users/${this.row.id}`)).body ?? { ...this.row, ...this.values };
    announce(t("saved", { name: now.name }));
    this.end(now);
  }

  // Another client has changed or deleted the user. Shows both versions, and carries out the decision.
  async decide(mine) {
    const answer = await request("GET", `/users/${this.row.id}`);
    if (!answer.ok && answer.status !== 404) return this.explain(answer.problem);
    const current = answer.ok ? answer.body : null;
    // A save whose answer was lost, or another client that saved the same values.
    if (current && FIELDS.every((field) => current[field] === mine[field].trim())) return this.saved(current);
    const decision = await showConflict({ base: this.row, current, mine });
    if (decision === "theirs") {
      this.end(current);
      if (!current) dispatchEvent(new Event("userschange"));
      return;
    }
    if (current) {
      this.row = current;
      this.etag = answer.headers.get("ETag");
      this.source.replaceChildren(badge(answer.source));
    }
    if (decision !== "mine") return this.inputs.name.focus();
    if (current) return this.send();
    this.save.disabled = true;
    const created = await request("PUT", `/users/${this.row.id}`, { body: mine, headers: { "If-None-Match": "*" } });
    this.save.disabled = false;
    if (created.ok) return this.saved(null);
    return this.explain(created.problem);
  }

  // Shows why the user was not saved: at the field at fault, else below the name.
  explain(problem) {
    const errors = problem.errors ?? [];
    for (const field of FIELDS) {
      const error = errors.find((each) => each.field === field);
      const detail = error ? t("field_problem", { field: t(field), detail: error.detail }) : "";
      this.problems[field].textContent = detail;
      this.inputs[field].classList.toggle("is-invalid", Boolean(error));
      this.inputs[field].setAttribute("aria-invalid", Boolean(error));
    }
    const others = errors.some(({ field }) => FIELDS.includes(field)) || problem.status === undefined;
    this.message.textContent = others ? "" : explain(problem);
    const first = FIELDS.find((field) => errors.some((error) => error.field === field));
    if (first) this.inputs[first].focus();
  }
}
