// The download of users: all of them, or those that a search finds.

import * as api from "./api.js";
import { saveFile } from "./csv.js";
import { openDialog } from "./dialogs.js";
import { element, loadStyle } from "./dom.js";
import { explain } from "./states.js";
import { translator } from "./texts.js";
import { texts } from "./texts/import.js";
import { toast } from "./toasts.js";

const t = translator(texts);
const FORMATS = ["csv", "excel", "ndjson"];
const SEARCH_TIMEOUT_MS = 10 * 60_000;

// Returns a button for each format. selection: returns { q, sort }, the search and the order of the rows. done: is
// called when a download has begun.
export function formats(selection = () => ({}), done = () => {}) {
  return element("div", { class: "export-formats" }, FORMATS.map((format) =>
    element("button", { type: "button", class: `btn btn-outline-secondary export-${format}`,
      onclick: () => start(format, selection(), done) },
      element("span", { class: "export-name" }, t(`format_${format}`)), element("small", {}, t(`format_${format}_text`)))));
}

// Opens a dialog with the formats, for the rows of a search in their order, or for all rows.
export async function openExport({ q, sort, found }) {
  await loadStyle("import.css");
  return openDialog(t("export"), (close) => {
    const radio = (name, text, checked) => element("div", { class: "form-check" },
      element("input", { type: "radio", class: "form-check-input", name: "export-rows", id: `export-rows-${name}`, checked }),
      element("label", { class: "form-check-label", for: `export-rows-${name}` }, text));
    const choice = q ? element("fieldset", { class: "export-rows" },
      element("legend", { class: "form-label" }, t("export_rows")),
      radio("found", found === null ? t("export_search") : t("export_found", { count: found }), true),
      radio("all", t("export_all"), false)) : null;
    const isSearch = () => Boolean(choice?.querySelector("#export-rows-found").checked);
    return {
      body: [choice, element("p", {}, t(q ? "export_order" : "export_all_order"), " ", t("export_moment")),
        formats(() => ({ q: isSearch() ? q : "", sort }), () => close(true))],
      footer: [],
    };
  }, { wide: true });
}

// A download cannot send a key. So the page requests, with its key, an address that is valid for a minute. The browser
// downloads all rows from there, and writes them to the disk as they come: a million rows need no memory.
async function start(format, { q, sort }, done) {
  const answer = await api.request("GET", `/console/export?format=${format}`);
  if (!answer.ok) {
    toast(explain(answer.problem), { kind: "failed" });
    return;
  }
  const query = new URLSearchParams();
  if (sort) query.set("sort", sort);
  if (q) query.set("q", q);
  const path = `${answer.body.address}${query.size ? `?${query}` : ""}`;
  done();
  if (q) {
    await fetchFile(path, answer.body.address.split("/").at(-1));
  } else {
    element("a", { href: api.address(path).href, download: "" }).click();
    toast(t("download_began"));
  }
}

// The browser keeps the address of a download in its list, and nothing of users belongs there. So the page fetches the
// rows of a search by itself, and saves them.
async function fetchFile(path, name) {
  const remove = toast(t("download_prepared"), { stays: true });
  const answer = await api.request("GET", path, { isFile: true, timeout: SEARCH_TIMEOUT_MS });
  remove();
  if (answer.ok) saveFile(name, answer.body);
  else toast(`${t("download_failed")} ${explain(answer.problem)}`, { kind: "failed" });
}
