// The table of users: one row each, which can be chosen, edited in place and deleted.

import { element, icon } from "./dom.js";
import { rights } from "./rights.js";
import { moment, number, translator } from "./texts.js";
import { texts } from "./texts/users.js";

const t = translator(texts);

const COLUMNS = ["id", "name", "email", "created_at"];

// The open edits (user_edits.js) by the id of their user.
export const openEdits = new Map();

export class UserTable {
  // chosen: a Map of rows by id. onsort, onchoose, ondelete: called with an order, nothing, and a row. onedit: called with
  // a row and what is called at the end of its edit; returns a promise of the edit's element.
  constructor({ chosen, onsort, onchoose, onedit, ondelete }) {
    Object.assign(this, { chosen, onsort, onchoose, onedit, ondelete });
    this.last = null; // the id of the row that was chosen last, where a range begins
    this.all = element("input", { type: "checkbox", class: "form-check-input", id: "choose-all",
      "aria-label": t("choose_page"), onchange: () => this.choosePage(this.all.checked) });
    this.head = element("tr");
    this.body = element("tbody", { onkeydown: (event) => this.pressed(event) });
    this.element = element("table", { class: "users-table" },
      element("caption", { class: "visually-hidden" }, t("users")), element("thead", {}, this.head), this.body);
  }

  draw(rows, sort, { keepsFocus = false } = {}) {
    this.rows = rows;
    const focused = this.element.contains(document.activeElement) ? document.activeElement.id : "";
    const at = [...this.body.children].indexOf(document.activeElement?.closest("tr"));
    this.drawHead(sort);
    const shown = new Set(rows.map(({ id }) => id));
    // Rows that are being edited stay, whatever page is shown: nothing that was typed is lost.
    const edited = [...openEdits.values()].filter(({ row }) => !shown.has(row.id)).map(({ element: line }) => line);
    this.body.replaceChildren(...edited, ...rows.map((row) => openEdits.get(row.id)?.element ?? this.line(row)));
    this.drawChoice();
    if (!focused || !keepsFocus) return;
    // If the row is gone, the same control of the row in its place.
    const next = rows[Math.min(at, rows.length - 1)];
    (document.getElementById(focused) ?? document.getElementById(focused.replace(/\d+$/, next?.id)))?.focus();
  }

  drawHead(sort) {
    const key = sort.replace(/^-/, "");
    const isDown = sort.startsWith("-");
    const heads = COLUMNS.map((name) => {
      const isSorted = name === key;
      const next = isSorted && !isDown ? `-${name}` : name;
      return element("th", { scope: "col", class: `column-${name}`,
        "aria-sort": isSorted ? (isDown ? "descending" : "ascending") : null },
        element("button", { type: "button", class: "sort", id: `sort-${name}`, onclick: () => this.onsort(next) },
          t(name), isSorted && icon(isDown ? "down" : "up")));
    });
    this.head.replaceChildren(element("th", { scope: "col", class: "column-choose" }, this.all), ...heads,
      element("th", { scope: "col", class: "column-actions" },
        element("span", { class: "visually-hidden" }, t("actions"))));
  }

  line(row) {
    const mayWrite = rights().may_write;
    const act = (name, label, glyph, run) => element("button", { type: "button", class: "btn-quiet",
      id: `${name}-${row.id}`, disabled: !mayWrite, "aria-label": label, title: mayWrite ? label : t("may_not_write"),
      onclick: run }, icon(glyph));
    const edit = act("edit", t("edit_name", { name: row.name }), "pencil", async () => {
      const begun = await this.onedit(row, (changed) => this.endEdit(changed ?? row));
      if (begun) line.replaceWith(begun);
      begun?.querySelector("input")?.focus();
    });
    const remove = act("delete", t("delete_name", { name: row.name }), "trash", () => this.ondelete(row));
    const choose = element("input", { type: "checkbox", class: "form-check-input", id: `choose-${row.id}`,
      checked: this.chosen.has(row.id), "aria-label": t("choose_name", { name: row.name }),
      onclick: (event) => this.choose(row, choose.checked, event.shiftKey) });
    const line = element("tr", { dataset: { id: row.id } },
      element("td", { class: "column-choose" }, choose),
      element("td", { class: "column-id" }, String(row.id)),
      element("td", { class: "column-name", title: row.name }, element("a", { href: `#/users/${row.id}` }, row.name)),
      element("td", { class: "column-email", title: row.email }, row.email),
      element("td", { class: "column-created_at" },
        element("time", { dateTime: row.created_at, title: row.created_at }, moment(row.created_at))),
      element("td", { class: "column-actions" }, edit, remove));
    return line;
  }

  endEdit(row) {
    const index = this.rows.findIndex(({ id }) => id === row.id);
    const old = this.body.querySelector(`tr[data-id="${row.id}"]`);
    if (index < 0) {
      old?.remove();
      return;
    }
    this.rows[index] = row;
    if (this.chosen.has(row.id)) this.chosen.set(row.id, row);
    old?.replaceWith(this.line(row));
    document.getElementById(`edit-${row.id}`)?.focus();
  }

  // ---- choosing ----

  choose(row, isChosen, isRange) {
    const ids = this.rows.map(({ id }) => id);
    const [from, to] = [ids.indexOf(this.last), ids.indexOf(row.id)].sort((a, b) => a - b);
    const rows = isRange && from >= 0 ? this.rows.slice(from, to + 1) : [row];
    for (const each of rows) this.set(each, isChosen);
    this.last = row.id;
    this.drawChoice();
    this.onchoose();
  }

  choosePage(isChosen) {
    for (const row of this.rows) this.set(row, isChosen);
    this.drawChoice();
    this.onchoose();
  }

  set(row, isChosen) {
    if (isChosen) this.chosen.set(row.id, row);
    else this.chosen.delete(row.id);
  }

  drawChoice() {
    let count = 0;
    for (const row of this.rows ?? []) {
      const isChosen = this.chosen.has(row.id);
      count += isChosen;
      const box = document.getElementById(`choose-${row.id}`);
      if (box) box.checked = isChosen;
      box?.closest("tr").classList.toggle("chosen", isChosen);
    }
    this.all.checked = count > 0 && count === this.rows.length;
    this.all.indeterminate = count > 0 && count < this.rows.length;
  }

  // The arrow keys go from row to row in the same column, and with Shift choose the rows on the way.
  pressed(event) {
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    const control = event.target.closest("[id]");
    const match = /^(choose|edit|delete)-(\d+)$/.exec(control?.id ?? "");
    if (!match) return;
    event.preventDefault();
    const ids = this.rows.map(({ id }) => id);
    const at = ids.indexOf(Number(match[2]));
    const next = this.rows[at + (event.key === "ArrowDown" ? 1 : -1)];
    if (!next) return;
    document.getElementById(`${match[1]}-${next.id}`)?.focus();
    if (event.shiftKey && match[1] === "choose") {
      this.set(this.rows[at], true);
      this.set(next, true);
      this.last = next.id;
      this.drawChoice();
      this.onchoose();
    }
  }
}
