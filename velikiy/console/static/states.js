// The states of a view without data: loading, nothing found, and a failed request with a way to try again.

import { element, icon } from "./dom.js";
import { language, translator } from "./texts.js";
import { texts } from "./texts/shell.js";

const t = translator(texts);

// Returns the sentence for a failed request (api.js): what happened, and what to do.
export function explain(problem) {
  if (problem.kind === "away") return t("problem_away");
  if (problem.kind === "slow") return t("problem_slow");
  if (problem.status === 401) return t("problem_401");
  if (problem.needsScope) return t("problem_403");
  if (problem.status === 404) return t("problem_404");
  if (problem.status === 429) return t("problem_429");
  if (problem.status >= 500) return t("problem_5xx", { status: String(problem.status) });
  const fields = problem.errors?.filter(({ field }) => field) ?? [];
  if (fields.length && language() !== "en") {
    return fields.map(({ field, detail }) => `${field}: ${reason(detail)}`).join("; ");
  }
  return problem.detail || problem.title || t("problem_other", { status: String(problem.status) });
}

// The sentences of the API about a field (velikiy/resources), by their beginning.
const REASONS = {
  reason_required: /^is required/,
  reason_text: /^must be a string/,
  reason_length: /^must have 1 to (?<most>\d+) characters; yours has (?<count>\d+)/,
  reason_too_long: /^must have at most (?<most>\d+) characters/,
  reason_visible: /^must contain a visible character/,
  reason_control: /^must not contain control characters/,
  reason_surrogate: /^contains an unpaired surrogate/,
  reason_email: /^is not an e-mail address/,
  reason_scripts: /^mixes letters of several scripts/,
  reason_taken: /^is taken by another/,
  reason_unknown: /^is not a known field/,
};

// Returns why a field was refused, in the language of the page. The API's own sentences are English and know more.
export function reason(detail) {
  if (language() === "en") return detail;
  for (const [key, sentence] of Object.entries(REASONS)) {
    const match = sentence.exec(detail);
    if (match) return t(key, { ...match.groups });
  }
  return detail;
}

export function loading(text = t("loading")) {
  return element("div", { class: "state", role: "status" },
    element("span", { class: "spinner-border text-secondary", "aria-hidden": "true" }), element("p", {}, text));
}

export function empty(title, text = "", ...actions) {
  return element("div", { class: "state" },
    icon("users"), element("p", { class: "state-title" }, title), text && element("p", {}, text), actions);
}

// Requests the edges, for a view that has nothing without them. Returns null if the view shows the failure instead, or was
// left. again: () => draws the view once more.
export async function edgesFor(main, heading, { api, signal }, again) {
  main.append(loading());
  const answer = await api.request("GET", "/console/edges", { signal });
  if (signal.aborted) return null;
  if (answer.ok) return answer.body;
  main.replaceChildren(heading, failed(answer.problem, () => {
    main.replaceChildren();
    again();
  }));
  return null;
}

export function failed(problem, retry) {
  return element("div", { class: "state state-failed", role: "alert" },
    icon("alert"),
    element("p", { class: "state-title" }, t("failed")),
    element("p", {}, explain(problem)),
    problem.requestId && element("p", { class: "small" }, t("request_id"), " ", element("code", {}, problem.requestId)),
    retry && element("button", { type: "button", class: "btn btn-primary", onclick: retry }, t("retry")));
}
