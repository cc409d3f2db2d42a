// A lost race: another client has changed a user since the person began. The dialog shows both versions, and the person
// decides.

import { openDialog } from "./dialogs.js";
import { element } from "./dom.js";
import { moment, translator } from "./texts.js";
import { texts } from "./texts/users.js";

const t = translator(texts);

const FIELDS = ["name", "email"];

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
