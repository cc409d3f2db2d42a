// Editing a user in its row of the table. An edit stays open until it is saved or cancelled: other pages, other views
// and failed requests do not close it.

import { request } from "./api.js";
import { badge } from "./badge.js";
import { announce, element } from "./dom.js";
import { explain } from "./states.js";
import { translator } from "./texts.js";
import { texts } from "./texts/users.js";
import { toast } from "./toasts.js";
import { FIELDS, saveOver, showFieldProblems } from "./user_form.js";
import { openEdits } from "./user_table.js";

const t = translator(texts);

addEventListener("beforeunload", (event) => {
  if ([...openEdits.values()].some((edit) => edit.isChanged)) event.preventDefault();
});

// Reads the user as it is now and opens its edit. Returns the row of the table, or null if it cannot be edited.
export async function beginEdit(row, onend) {
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
    this.take({ row: answer.body, etag: answer.headers.get("ETag"), source: answer.source });
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
    this.badge = element("div", {}, badge(answer.source));
    this.save = element("button", { type: "button", class: "btn btn-sm btn-primary", id: `save-${id}`,
      onclick: () => this.send() }, t("save"));
    const cancel = element("button", { type: "button", class: "btn btn-sm btn-outline-secondary", id: `cancel-${id}`,
      onclick: () => this.end(null) }, t("cancel"));
    this.element = element("tr", { class: "editing", dataset: { id }, onkeydown: (event) => this.pressed(event) },
      element("td", { class: "column-choose" }),
      element("td", { class: "column-id" }, String(id)),
      element("td", { class: "column-name" }, this.inputs.name, this.problems.name, this.message),
      element("td", { class: "column-email" }, this.inputs.email, this.problems.email),
      element("td", { class: "column-edit", colSpan: 2 }, this.save, cancel, this.badge));
  }

  // seen: the read that the person saw.
  take({ row, etag, source }) {
    this.seen = { row, etag, source };
    this.badge?.replaceChildren(badge(source));
  }

  get row() {
    return this.seen.row;
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
    this.message.textContent = "";
    showFieldProblems([], this.inputs, this.problems);
    this.wait(true);
    const { end, problem, ...read } = await saveOver(this.seen, this.values);
    this.wait(false);
    if (end === "saved") {
      announce(t("saved", { name: read.row.name }));
      return this.end(read.row);
    }
    if (end === "theirs") {
      this.end(read.row);
      if (!read.row) dispatchEvent(new Event("userschange"));
      return undefined;
    }
    this.take(read);
    if (!problem) this.inputs.name.focus();
    else if (!showFieldProblems(problem.errors, this.inputs, this.problems)) this.message.textContent = explain(problem);
    return undefined;
  }

  // Input during a save would be lost with it.
  wait(isWaiting) {
    this.save.disabled = isWaiting;
    for (const input of Object.values(this.inputs)) input.readOnly = isWaiting;
  }
}
