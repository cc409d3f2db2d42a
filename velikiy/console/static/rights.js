// The rights of this page. If keys are required, they depend on the key of this tab.

import { apiKey, onUnauthorized, request, setApiKey } from "./api.js";
import { element } from "./dom.js";
import { explain } from "./states.js";
import { moment, translator } from "./texts.js";
import { texts } from "./texts/shell.js";

const t = translator(texts);

// As GET /console/key describes it. Until the first answer the page offers everything: the API decides anyway.
let known = { auth: "off", may_read: true, may_write: true, key: null };

export function rights() {
  return known;
}

// Requests the rights from the service, and dispatches "rightschange" for the views.
export async function learnRights() {
  let answer = await request("GET", "/console/key", { asks: false });
  if (answer.status === 401) {
    setApiKey(""); // revoked or expired meanwhile
    answer = await request("GET", "/console/key", { asks: false });
  }
  if (!answer.ok) return;
  known = answer.body;
  dispatchEvent(new Event("rightschange"));
}

// Opens the dialog for the key. Returns a promise of a valid key, or of null if it was dismissed.
export async function askForKey({ isNeeded = false } = {}) {
  const dialogs = await import("./dialogs.js").catch(() => null); // no row waits for it
  if (!dialogs) return null;
  return dialogs.openDialog(t("key_title"), (close) => {
    const problem = element("div", { class: "invalid-feedback", id: "key-problem" });
    const field = element("input", { class: "form-control", id: "key-field", type: "password", autocomplete: "off",
      spellcheck: false, "aria-describedby": "key-problem key-help" });
    const refuse = (text) => {
      problem.textContent = text;
      field.classList.add("is-invalid");
      field.setAttribute("aria-invalid", "true");
      field.focus();
    };
    const submit = async () => {
      const key = field.value.trim();
      if (!key) return refuse(t("key_empty"));
      const headers = { Authorization: `Bearer ${key}` };
      const answer = /^[!-~]+$/.test(key) ? await request("GET", "/console/key", { asks: false, headers }) : null;
      if (!answer || answer.status === 401) return refuse(t("key_wrong"));
      if (!answer.ok) return refuse(explain(answer.problem));
      setApiKey(key);
      known = answer.body;
      dispatchEvent(new Event("rightschange"));
      return close(key);
    };
    const forget = () => {
      setApiKey("");
      close(null);
      learnRights();
    };
    return {
      submit,
      body: [
        isNeeded && element("p", {}, t("key_needed")),
        element("p", { class: "text-secondary" }, describeRights()),
        element("label", { class: "form-label", for: "key-field" }, t("key_label")),
        field, problem,
        element("p", { class: "form-text", id: "key-help" }, t("key_help")),
      ],
      footer: [
        apiKey() && element("button", { type: "button", class: "btn btn-outline-secondary me-auto", onclick: forget },
          t("key_forget")),
        element("button", { type: "button", class: "btn btn-outline-secondary", onclick: () => close(null) },
          t("cancel")),
        element("button", { type: "submit", class: "btn btn-primary" }, t("key_use")),
      ],
    };
  });
}

export function describeRights() {
  if (known.key) {
    const rightsText = t(known.may_write ? "rights_write" : "rights_read");
    const until = known.key.expires_at ? ` ${t("key_until", { date: moment(known.key.expires_at) })}` : "";
    return t("key_describes", { name: known.key.name, rights: rightsText }) + until;
  }
  return known.may_read ? t("rights_open_read") : t("rights_nothing");
}

onUnauthorized(() => askForKey({ isNeeded: true }));
