// The view of one user: the fields, where each tier has them, and the history.

import * as api from "./api.js";
import { badge } from "./badge.js";
import { announce, element, icon } from "./dom.js";
import { showHistory } from "./history.js";
import { rights } from "./rights.js";
import { empty, explain, failed, loading } from "./states.js";
import { moment, translator } from "./texts.js";
import { texts } from "./texts/user.js";
import { showTiers } from "./tiers.js";
import { toast } from "./toasts.js";
import { FIELDS, saveOver, showFieldProblems } from "./user_form.js";
import { deleteUser } from "./user_writes.js";

const t = translator(texts);
const INPUT_MODES = { name: "text", email: "email" };
const LIMITS = { name: 100, email: 254 };

// What was typed and is not saved, by the id of the user: { seen, entered }. It stays when the user is read again and
// when the view is left. seen: the read that the person saw, { row, etag, source }; a save is conditional on it.
const drafts = new Map();

addEventListener("beforeunload", (event) => {
  if (drafts.size) event.preventDefault();
});

export async function show(main, { parameters: [id], signal }) {
  const path = `/users/${id}`;
  let latest = null; // the last read, { row, etag, source }; null if there is no such user

  const heading = element("h1", { class: "user-name" }, t("user", { id }));
  const source = element("span", { class: "user-source" });
  const fields = element("div", {}, loading());
  main.append(
    element("a", { class: "back", href: "#/users" }, icon("previous"), t("all_users")),
    element("div", { class: "view-head" }, heading, source),
    element("section", { class: "surface card-pad", "aria-label": t("fields") }, fields));
  const tiers = showTiers(main, { path, read, exists: () => latest !== null, signal });
  const history = showHistory(main, { path, current: () => latest, changed: () => load(), signal });
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
      take({ row: answer.body, etag: answer.headers.get("ETag"), source: answer.source });
    } else if (answer.status === 404) {
      latest = null;
      form = null;
      heading.textContent = t("user", { id });
      fields.replaceChildren(empty(t("missing"), t("missing_text")));
    } else {
      form = null;
      fields.replaceChildren(failed(answer.problem, load));
    }
    await Promise.all([tiers.refresh(), history.refresh()]);
  }

  function take(read) {
    latest = read;
    heading.textContent = read.row.name;
    drawFacts();
    // A form in which something is typed stays as it is. Its save shows what has changed meanwhile.
    if (!form || !drafts.has(id)) drawForm();
    else changed();
  }

  // ---- the form ----

  let form = null;
  const inputs = {};
  const places = {}; // below the inputs, for what is wrong with them
  let seen = null; // the read that the form is about
  const facts = element("dl", { class: "facts" });

  function drawForm() {
    const draft = drafts.get(id);
    seen = draft?.seen ?? latest;
    const focused = fields.contains(document.activeElement) ? document.activeElement.id : "";
    for (const name of FIELDS) {
      places[name] = element("div", { class: "invalid-feedback", id: `user-${name}-problem` });
      inputs[name] = element("input", { class: "form-control", id: `user-${name}`, name, type: "text",
        inputMode: INPUT_MODES[name], value: draft?.entered[name] ?? seen.row[name], maxLength: LIMITS[name],
        autocomplete: "off", spellcheck: false, "aria-describedby": `user-${name}-problem`, oninput: changed });
    }
    form = element("form", { class: "user-form", noValidate: true, onsubmit: (event) => {
      event.preventDefault();
      save();
    } },
      FIELDS.map((name) => element("div", { class: "field" },
        element("label", { class: "form-label", for: `user-${name}` }, t(name)), inputs[name], places[name])),
      element("div", { class: "form-problem", role: "alert" }),
      element("div", { class: "form-actions" },
        element("button", { type: "submit", class: "btn btn-primary", disabled: true }, t("save")),
        element("button", { type: "button", class: "btn btn-outline-secondary undo", disabled: true, onclick: () => {
          drafts.delete(id);
          drawForm();
          inputs.name.focus();
        } }, t("discard")),
        element("button", { type: "button", class: "btn btn-outline-danger delete",
          onclick: () => deleteUser(latest.row) }, t("delete"))));
    fields.replaceChildren(form, facts);
    drawRights();
    if (focused) document.getElementById(focused)?.focus();
  }

  function drawFacts() {
    const { row } = latest;
    facts.replaceChildren(
      fact(t("id"), String(row.id)), fact(t("version"), String(row.version)),
      fact(t("created_at"), time(row.created_at)), fact(t("updated_at"), time(row.updated_at)));
  }

  function changed() {
    const entered = Object.fromEntries(FIELDS.map((name) => [name, inputs[name].value]));
    const isChanged = FIELDS.some((name) => entered[name] !== seen.row[name]);
    if (isChanged) drafts.set(id, { seen, entered });
    else drafts.delete(id);
    form.querySelector("[type=submit]").disabled = !isChanged || !rights().may_write;
    form.querySelector(".undo").disabled = !isChanged;
  }

  function drawRights() {
    if (!form) return;
    const mayWrite = rights().may_write;
    for (const name of FIELDS) inputs[name].readOnly = !mayWrite;
    form.querySelector(".delete").disabled = !mayWrite;
    changed();
  }

  async function save() {
    const draft = drafts.get(id);
    if (!draft) return;
    showFieldProblems([], inputs, places);
    const message = form.querySelector(".form-problem");
    message.textContent = "";
    form.querySelector("[type=submit]").disabled = true;
    for (const name of FIELDS) inputs[name].readOnly = true; // what is typed during a save would be lost with it
    const { end, problem, ...read } = await saveOver(draft.seen, draft.entered);
    if (end === "open") drafts.set(id, { seen: read, entered: draft.entered });
    else drafts.delete(id);
    if (end === "saved") toast(t("saved"));
    if (signal.aborted) return;
    if (end !== "open") {
      form = null; // drawn again as it is stored
      await load();
      return;
    }
    seen = read;
    drawRights();
    if (problem && !showFieldProblems(problem.errors, inputs, places)) message.textContent = explain(problem);
  }

  document.title = `${t("user", { id })} – Velikiy Flask`; // without the name: browsers keep titles
  await load();
  if (latest) announce(latest.row.name);
}

function fact(name, value) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value));
}

function time(text) {
  return element("time", { dateTime: text, title: text }, moment(text));
}
