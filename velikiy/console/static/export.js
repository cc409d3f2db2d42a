// The download of all users. The browser writes it to the disk as it comes, so a million rows need no memory.

import * as api from "./api.js";
import { openDialog } from "./dialogs.js";
import { element } from "./dom.js";
import { explain } from "./states.js";
import { translator } from "./texts.js";
import { texts } from "./texts/import.js";
import { toast } from "./toasts.js";

const t = translator(texts);
const FORMATS = ["csv", "excel", "ndjson"];

// Returns a button for each format. done: is called when a download has begun.
export function formats(done = () => {}) {
  return element("div", { class: "export-formats" }, FORMATS.map((format) =>
    element("button", { type: "button", class: `btn btn-outline-secondary export-${format}`, onclick: () => start(format, done) },
      element("span", { class: "export-name" }, t(`format_${format}`)), element("small", {}, t(`format_${format}_text`)))));
}

// Opens a dialog with the formats.
export function openExport() {
  return openDialog(t("export"), (close) => ({
    body: [element("p", {}, t("export_text")), formats(() => close(true))],
    footer: [],
  }));
}

// A download cannot send a key. So the page asks with its key for an address that counts for a minute.
async function start(format, done) {
  const answer = await api.request("GET", `/console/export?format=${format}`);
  if (!answer.ok) {
    toast(explain(answer.problem), { kind: "failed" });
    return;
  }
  element("a", { href: api.address(answer.body.address).href, download: "" }).click();
  toast(t("download_began"));
  done();
}
