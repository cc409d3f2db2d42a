// The badge of a read: which tier answered, how old its answer is, and how long it took.

import { element } from "./dom.js";
import { milliseconds, translator } from "./texts.js";
import { texts } from "./texts/shell.js";

const t = translator(texts);

export const TIERS = { nginx: "Nginx", redis: "Redis", postgres: "PostgreSQL", stale: "STALE" };

// Returns the element for a source (api.js). It is empty for an answer that no tier gave: a write, or no answer.
export function badge(source) {
  if (!source?.tier) return element("span", { class: "tier" });
  const parts = [TIERS[source.tier]];
  if (source.age !== null) parts.push(t("age", { seconds: source.age }));
  parts.push(t("milliseconds", { value: milliseconds(source.milliseconds) }));
  return element("span", { class: `tier tier-${source.tier}`, title: t(`from_${source.tier}`) },
    element("span", { class: "tier-dot", "aria-hidden": "true" }), parts.join(" · "));
}
