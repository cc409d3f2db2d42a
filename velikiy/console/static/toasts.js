// Short messages at the edge of the page: what was done, and a way to undo it.

import { announce, element, icon } from "./dom.js";
import { translator } from "./texts.js";
import { texts } from "./texts/shell.js";

const t = translator(texts);
const SHOWN_MS = 8000;

let stack = null;

// Shows a message, and returns a function that removes it. A message with an action stays until it is closed: nobody
// has to be quick.
//
// action: { label, run } of a button. kind: "done" or "failed". stays: until it is removed. onclose: called if the person
// closes the message.
export function toast(text, { action = null, kind = "done", stays = Boolean(action), onclose = null } = {}) {
  if (!stack) {
    stack = element("div", { class: "toasts", role: "region", "aria-label": t("messages") });
    document.body.append(stack);
  }
  const remove = () => {
    const hadFocus = message.contains(document.activeElement);
    message.remove();
    if (hadFocus) (stack.querySelector("button") ?? document.getElementById("main"))?.focus({ preventScroll: true });
  };
  const message = element("div", { class: `toast-message toast-${kind}` },
    element("span", { class: "toast-text" }, text),
    action && element("button", { type: "button", class: "btn btn-sm btn-light", onclick: () => {
      remove();
      action.run();
    } }, action.label),
    element("button", { type: "button", class: "btn-quiet", "aria-label": t("close"), onclick: () => {
      remove();
      onclose?.();
    } },
      icon("close")));
  stack.append(message);
  while (stack.children.length > 4) stack.firstElementChild.remove();
  if (!stays) setTimeout(remove, SHOWN_MS);
  announce(text);
  return remove;
}
