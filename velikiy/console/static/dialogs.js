// Modal dialogs. <dialog> keeps the focus inside, closes with Escape, and gives the focus back by itself.

import { element, icon } from "./dom.js";
import { translator } from "./texts.js";
import { texts } from "./texts/shell.js";

const t = translator(texts);
let opened = 0;

// Opens a dialog, and returns a promise of what `close(value)` was called with, or of null if it was dismissed.
//
// build: gets `close`, and returns { body, footer }: the content, and the buttons below it. `submit`, if present, is
// called when a button of the type "submit" is pressed, or Enter in a field.
export function openDialog(title, build, { wide = false } = {}) {
  return new Promise((resolve) => {
    const id = `dialog-${++opened}`;
    const before = document.activeElement;
    const close = (value) => {
      result = value;
      dialog.close();
    };
    let result = null;
    const { body, footer, submit } = build(close);
    const form = element("form", { class: "dialog-form", noValidate: true, onsubmit: (event) => {
      event.preventDefault();
      submit?.();
    } },
      element("header", {},
        element("h2", { id }, title),
        element("button", { type: "button", class: "btn-quiet", "aria-label": t("close"), onclick: () => close(null) },
          icon("close"))),
      element("div", { class: "dialog-body" }, body),
      element("footer", {}, footer));
    const dialog = element("dialog", { class: wide ? "wide" : null, "aria-labelledby": id, onclose: () => {
      dialog.remove();
      if (before?.isConnected) before.focus();
      resolve(result);
    } }, form);
    document.body.append(dialog);
    dialog.showModal();
    dialog.querySelector("[autofocus], input, textarea, footer .btn-primary")?.focus();
  });
}
