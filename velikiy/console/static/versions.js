// Two versions of a row, side by side.

import { openDialog } from "./dialogs.js";
import { element } from "./dom.js";
import { translator } from "./texts.js";
import { texts } from "./texts/user.js";

const t = translator(texts);
const FIELDS = ["name", "email"];

// Returns the names of the fields that differ.
export function differences(one, other) {
  return FIELDS.filter((name) => (one?.[name] ?? null) !== (other?.[name] ?? null));
}

// Asks what counts after a lost race. Returns a promise of "mine", "theirs", or null if nothing was chosen.
export function askWhichVersion({ mine, theirs }) {
  const differing = differences(mine, theirs);
  const rows = FIELDS.map((name) => element("tr", { class: differing.includes(name) ? "differs" : null },
    element("th", { scope: "row" }, t(name)),
    element("td", { "data-label": t("mine") }, mine[name]),
    element("td", { "data-label": t("theirs") }, theirs[name])));
  return openDialog(t("conflict"), (close) => ({
    body: [
      element("p", {}, t("conflict_text")),
      element("table", { class: "versions" },
        element("thead", {}, element("tr", {}, element("td", {}),
          element("th", { scope: "col" }, t("mine")), element("th", { scope: "col" }, t("theirs")))),
        element("tbody", {}, rows)),
    ],
    footer: [
      element("button", { type: "button", class: "btn btn-outline-secondary", onclick: () => close("theirs") },
        t("take_theirs")),
      element("button", { type: "submit", class: "btn btn-primary" }, t("keep_mine")),
    ],
    submit: () => close("mine"),
  }), { wide: true });
}
