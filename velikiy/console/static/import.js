// The import of a file: choose it, see its columns and first rows, then watch it go.
//
// The import goes on while other views are shown; its state is here, and not in the view.

import * as api from "./api.js";
import { saveFile } from "./csv.js";
import { announce, element, icon } from "./dom.js";
import { formats } from "./export.js";
import { Import, firstPreview, unfinished } from "./import_job.js";
import { rights } from "./rights.js";
import { explain, loading, reason } from "./states.js";
import { number, translator } from "./texts.js";
import { texts } from "./texts/import.js";
import { toast } from "./toasts.js";
import { FIELDS } from "./user_form.js";

const t = translator(texts);
const CONFLICTS = ["reject", "skip", "update"];
const MAX_REASONS = 5;

let job = null; // the import that is in progress or has ended
let draft = null; // the file that was chosen, and how it is read
let redraw = null; // by the view that is shown

addEventListener("beforeunload", (event) => {
  if (job?.state === "running") event.preventDefault();
});

export async function show(main, { signal }) {
  const content = element("div", {});
  main.append(
    element("div", { class: "view-head" }, element("h1", {}, t("import"))),
    content,
    element("section", { class: "surface card-pad", "aria-labelledby": "export-title" },
      element("h2", { id: "export-title" }, t("export")), element("p", { class: "explanation" },
        t("export_text"), " ", t("export_moment")),
      formats()));
  const draw = () => {
    if (signal.aborted) return;
    if (job) content.replaceChildren(drawJob());
    else if (draft) content.replaceChildren(drawDraft());
    else content.replaceChildren(drawChoice());
  };
  redraw = draw;
  signal.addEventListener("abort", () => { if (redraw === draw) redraw = null; });
  addEventListener("rightschange", () => { if (!job) draw(); }, { signal });
  draw();
}

// ---- a file is chosen ----

function drawChoice(problem = "") {
  const mayWrite = rights().may_write;
  const input = element("input", { type: "file", id: "import-file", class: "visually-hidden", disabled: !mayWrite,
    onchange: () => { if (input.files.length) choose(input.files[0]); } });
  const zone = element("div", { class: "drop-zone surface",
    ondragover: (event) => { event.preventDefault(); zone.classList.add("over"); },
    ondragleave: () => zone.classList.remove("over"),
    ondrop: (event) => {
      event.preventDefault();
      zone.classList.remove("over");
      if (mayWrite && event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
    } },
    icon("up"),
    element("p", { class: "state-title" }, t("choose")),
    element("p", {}, t("choose_text")),
    input,
    element("label", { class: "btn btn-primary", for: "import-file" }, t("choose_file")),
    element("p", { class: "small" }, mayWrite ? t("choose_limit") : t("no_right")),
    problem && element("p", { class: "import-problem", role: "alert" }, problem));
  return zone;
}

async function choose(file) {
  const own = draft = { file, content: null, preview: null, problem: "", isBusy: true, unfinished: null,
    options: { format: null, encoding: null, maps: [], on_conflict: "reject" } };
  redraw?.();
  try {
    own.content = await contentOf(file);
    own.unfinished = await unfinished(own.content);
  } catch {
    if (draft !== own) return;
    draft = null;
    redraw?.();
    toast(t("unreadable"), { kind: "failed" });
    return;
  }
  if (draft !== own) return; // another file was chosen meanwhile
  if (own.unfinished) own.options = { ...own.unfinished.options };
  await preview();
}

// Returns the content of the file, unpacked if it is packed with gzip.
async function contentOf(file) {
  const [first, second] = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  if (first !== 0x1f || second !== 0x8b) return file;
  return new Response(file.stream().pipeThrough(new DecompressionStream("gzip"))).blob();
}

async function preview() {
  const own = draft;
  own.isBusy = true;
  redraw?.();
  const answer = await firstPreview(own.content, own.options);
  if (draft !== own) return;
  own.isBusy = false;
  own.problem = answer.ok ? "" : explain(answer.problem);
  if (answer.ok) own.preview = answer.body;
  else if (own.preview) own.preview = { ...own.preview, columns: null, rows: [] };
  redraw?.();
}

// ---- the columns and the first rows ----

function drawDraft() {
  const { file, preview: known, problem, isBusy, options } = draft;
  const back = element("button", { type: "button", class: "btn btn-outline-secondary", onclick: () => {
    draft = null;
    redraw?.();
  } }, t("other_file"));
  const title = element("div", { class: "section-head" }, element("h2", {}, file.name),
    element("span", { class: "explanation" }, size(file.size)));
  if (!known) {
    return element("section", { class: "surface card-pad" }, title,
      isBusy ? loading() : [element("p", { class: "import-problem", role: "alert" }, problem), drawEncoding(null)], back);
  }
  const isReady = known.columns !== null && !problem && !isBusy && rights().may_write;
  return element("section", { class: "surface card-pad", "aria-busy": String(isBusy) },
    title,
    element("div", { class: "import-options" }, drawEncoding(known), drawConflicts(options)),
    element("h3", {}, t("columns")),
    element("p", { class: "explanation" }, known.columns ? t("columns_text") : t("columns_missing")),
    drawMapping(known),
    element("h3", {}, t("first_rows")),
    problem && element("p", { class: "import-problem", role: "alert" }, problem),
    drawRows(known),
    draft.unfinished && element("p", { class: "import-note" }, t("continues")),
    element("div", { class: "form-actions" },
      element("button", { type: "button", class: "btn btn-primary start", disabled: !isReady, onclick: start },
        t(draft.unfinished ? "continue" : "start")),
      draft.unfinished && element("button", { type: "button", class: "btn btn-outline-secondary", onclick: () => {
        draft.unfinished = null;
        redraw?.();
      } }, t("start_over")),
      back));
}

function drawEncoding(known) {
  const names = known?.encodings ?? ["utf-8", "windows-1252", "windows-1251", "koi8-r"];
  const own = draft.options.encoding;
  return element("div", { class: "field" },
    element("label", { class: "form-label", for: "import-encoding" }, t("encoding")),
    element("select", { class: "form-select", id: "import-encoding", onchange: (event) => {
      draft.options.encoding = event.target.value || null;
      preview();
    } },
      element("option", { value: "", selected: !own },
        known?.encoding && !own ? t("recognised", { name: known.encoding }) : t("recognise")),
      names.map((name) => element("option", { value: name, selected: name === own }, name))));
}

function drawConflicts(options) {
  return element("fieldset", { class: "field" },
    element("legend", { class: "form-label" }, t("conflict")),
    CONFLICTS.map((name) => element("div", { class: "form-check" },
      element("input", { class: "form-check-input", type: "radio", name: "conflict", id: `conflict-${name}`, value: name,
        checked: options.on_conflict === name, onchange: () => { options.on_conflict = name; } }),
      element("label", { class: "form-check-label", for: `conflict-${name}` }, t(`conflict_${name}`)))));
}

// A field has one column, or several, whose values are joined with a blank.
function drawMapping(known) {
  const chosen = chosenColumns(known);
  return element("div", { class: "mapping" }, Object.entries(known.fields).map(([field, isRequired]) => {
    const columns = chosen[field].length ? chosen[field] : [""];
    const alternatives = draft.options.maps.length ? [] : (known.columns?.[field] ?? []).slice(1);
    return element("div", { class: "mapping-row" },
      element("span", { class: "mapping-field", id: `map-${field}` }, t(field), !isRequired && element("small", {}, t("optional"))),
      element("span", { class: "mapping-arrow", "aria-hidden": "true" }, "←"),
      element("span", { class: "mapping-columns" },
        columns.map((column, place) => drawColumn(known, field, place, column)),
        element("button", { type: "button", class: "btn-quiet", title: t("join"), "aria-label": t("join_field", { field: t(field) }),
          disabled: !columns[0], onclick: () => map(field, [...columns, ""]) }, icon("plus")),
        alternatives.length > 0 && element("small", { class: "explanation" },
          t("else_columns", { columns: alternatives.map((names) => names.join(" + ")).join(", ") }))));
  }));
}

function drawColumn(known, field, place, column) {
  return element("select", { class: "form-select", "aria-label": t("column_of", { field: t(field) }),
    onchange: (event) => {
      const columns = [...chosenColumns(known)[field]];
      columns[place] = event.target.value;
      map(field, columns.filter(Boolean));
    } },
    element("option", { value: "", selected: !column }, t("no_column")),
    known.names.filter(Boolean).map((name) => element("option", { value: name, selected: name === column }, name)));
}

// Returns the columns of each field: as chosen, or else as recognised.
function chosenColumns(known) {
  draft.chosen ??= {};
  return Object.fromEntries(Object.keys(known.fields).map((field) =>
    [field, draft.chosen[field] ?? known.columns?.[field]?.[0] ?? namesake(known, field)]));
}

function namesake(known, field) {
  return known.names.filter((name) => name.toLowerCase() === field).slice(0, 1);
}

function map(field, columns) {
  draft.chosen = { ...chosenColumns(draft.preview), [field]: columns };
  const complete = Object.entries(draft.chosen).map(([name, own]) => [name, own.filter(Boolean)]);
  draft.options.maps = complete.filter(([, own]) => own.length).map(([name, own]) => `${own.join("+")}=${name}`);
  if (columns.includes("")) redraw?.(); // another column is about to be chosen
  else preview();
}

function drawRows(known) {
  if (!known.rows.length) return element("p", { class: "explanation" }, t(known.columns ? "no_rows" : "no_rows_yet"));
  const fields = Object.keys(known.fields);
  return element("div", { class: "table-frame", tabIndex: 0, role: "region", "aria-label": t("first_rows") }, element("table", { class: "first-rows" },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, t("line")),
      fields.map((field) => element("th", { scope: "col" }, t(field))))),
    element("tbody", {}, known.rows.map((row) => element("tr", { class: row.errors.length ? "bad" : null },
      element("td", {}, number(row.line)),
      row.errors.length
        ? element("td", { colSpan: fields.length }, reasons(row.errors))
        : fields.map((field) => element("td", {}, String(row.values[field] ?? ""))))))));
}

function reasons(errors) {
  // The file of rejected rows has names from the imported file, so a name is looked up among the fields only.
  const named = ({ field, detail }) => (FIELDS.includes(field) ? `${t(field)}: ${reason(detail)}` : `${field} ${reason(detail)}`.trim());
  return errors.map(named).join("; ");
}

// ---- the import ----

function start() {
  const { content, preview: known, options } = draft;
  const format = { ...options, format: known.format, encoding: known.encoding };
  // Read in another way, the pieces would be others.
  const isSame = JSON.stringify(format) === JSON.stringify(draft.unfinished?.options);
  job = new Import(content, format, { isWhole: known.is_whole, earlier: isSame ? draft.unfinished : null, changed: () => redraw?.() });
  job.name = draft.file.name;
  draft = null;
  run();
}

async function run() {
  const own = job;
  await own.run();
  if (own.state === "done") {
    const text = t("done", { count: own.counts.created });
    if (redraw) announce(text);
    else toast(text);
  }
}

function drawJob() {
  const { state, counts, progress, problem } = job;
  const titles = { running: "running", waiting: "waiting", stopped: "stopped", failed: "failed", done: "finished" };
  return element("section", { class: "surface card-pad" },
    element("div", { class: "section-head" }, element("h2", {}, t(titles[state])),
      element("span", { class: "explanation" }, job.name)),
    element("progress", { class: "import-progress", max: 1, value: progress, "aria-label": t("progress") }),
    element("p", { class: "import-percent" }, t("percent", { percent: Math.floor(progress * 100) })),
    element("dl", { class: "counts" },
      ["created", "updated", "unchanged", "skipped", "rejected"]
        .filter((name) => counts[name] || name === "created" || name === "rejected")
        .map((name) => element("div", { class: `count-${name}` }, element("dt", {}, t(name)), element("dd", {}, number(counts[name]))))),
    problem && element("p", { class: "import-problem", role: "alert" }, sentence(problem),
      (state === "failed" || state === "stopped") && problem.kind !== "page" && [" ", t("nothing_half")]),
    counts.rejected > 0 && element("div", { class: "rejects" },
      element("p", { class: "explanation" }, t("rejects_text")),
      element("ul", {}, job.reasons.slice(0, MAX_REASONS).map(({ line, errors }) =>
        element("li", {}, t("reason", { line, reason: reasons(errors) }))))),
    element("div", { class: "form-actions" }, buttons(state, counts)));
}

function sentence(problem) {
  if (problem.kind === "row") return t("row_too_long");
  return problem.kind === "page" ? t("page_failed", { detail: problem.detail }) : explain(problem);
}

function buttons(state, counts) {
  const button = (text, onclick, kind = "outline-secondary") =>
    element("button", { type: "button", class: `btn btn-${kind}`, onclick }, text);
  const again = () => { job = null; redraw?.(); };
  const rejects = counts.rejected > 0 && button(t("download_rejects"), saveRejects, state === "done" ? "primary" : "outline-secondary");
  if (state === "running" || state === "waiting") return [button(t("stop"), () => job.stop()), rejects];
  if (state === "done") {
    return [rejects, element("a", { class: `btn btn-${rejects ? "outline-secondary" : "primary"}`, href: "#/users" }, t("to_users")),
      button(t("another"), again)];
  }
  return [state === "stopped" && button(t("continue"), run, "primary"), rejects, button(t("another"), again)];
}

function saveRejects() {
  saveFile(`${job.name}.rejects.ndjson`, new Blob(job.rejects, { type: "application/x-ndjson" }));
}

function size(bytes) {
  return bytes < 1_000_000 ? t("kilobytes", { size: number(bytes / 1000, 1) }) : t("megabytes", { size: number(bytes / 1e6, 1) });
}
