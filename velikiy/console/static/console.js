// The shell of the console: the header, and the view that the fragment of the address names.

import * as api from "./api.js";
import { announce, element, icon, loadStyle } from "./dom.js";
import { askForKey, describeRights, learnRights, rights } from "./rights.js";
import { empty, failed, loading } from "./states.js";
import { LANGUAGES, language, setLanguage, translator } from "./texts.js";
import { texts } from "./texts/shell.js";

const t = translator(texts);

// A view is loaded when it is first shown. Its module exports show(main, { parameters, query, api, t, signal }), which
// may return a function: it gets the same, and is called instead of `show` if only the query or history.state changes.
const ROUTES = [
  { address: /^users$/, section: "users", load: () => import("./users.js") },
  { address: /^users\/([1-9][0-9]*)$/, section: "users", load: () => import("./user.js"), style: "user.css" },
  { address: /^import$/, section: "import", load: () => import("./import.js"), style: "import.css" },
  { address: /^live$/, section: "live", load: () => import("./live.js"), style: "live.css" },
  { address: /^prove$/, section: "prove", load: () => import("./prove.js"), style: "prove.css" },
];

const SLOW_MS = 150; // a view that loads faster shows no "Loading"

let current = null; // { path, language, controller, update }

function here() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { path: path || "users", query: new URLSearchParams(query) };
}

async function show() {
  const { path, query } = here();
  if (current?.path === path && current.language === language() && current.update) {
    current.update({ query });
    return;
  }
  const isFirst = current === null;
  current?.controller.abort();
  const controller = new AbortController();
  const own = current = { path, language: language(), controller, update: null };
  const route = ROUTES.find(({ address }) => address.test(path));
  document.documentElement.lang = language();
  drawHeader(route?.section);
  document.title = `${route ? t(route.section) : t("no_page")} – Velikiy Flask`;
  const main = element("main", { id: "main", tabIndex: -1 });
  document.getElementById("main").replaceWith(main);
  if (!isFirst) {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
    announce(route ? t(route.section) : t("no_page"));
  }
  if (!route) {
    const link = element("a", { class: "btn btn-primary", href: "#/users" }, t("to_users"));
    main.append(element("h1", { class: "visually-hidden" }, t("no_page")),
      empty(t("no_page"), t("no_page_text"), link));
    return;
  }
  const waiting = setTimeout(() => main.append(loading()), SLOW_MS);
  let view;
  try {
    [view] = await Promise.all([route.load(), route.style && loadStyle(route.style)]);
  } catch {
    if (!controller.signal.aborted) main.replaceChildren(viewFailed());
    return;
  } finally {
    clearTimeout(waiting);
  }
  if (controller.signal.aborted) return;
  main.replaceChildren();
  const parameters = route.address.exec(path).slice(1);
  const update = await view.show(main, { parameters, query, api, t, signal: controller.signal });
  if (typeof update === "function") own.update = update;
}

function viewFailed() {
  const state = failed({ kind: "", detail: t("view_failed") }, () => location.reload());
  state.querySelector("button").textContent = t("reload");
  return state;
}

// ---- the header ----

function drawHeader(section) {
  const link = (name, href) => element("a",
    { href, class: "nav-item", "aria-current": name === section ? "page" : null }, t(name));
  const header = element("header", { class: "shell" },
    element("div", { class: "shell-row" },
      element("a", { class: "brand", href: "#/users" }, logo(), "Velikiy Flask"),
      element("nav", { "aria-label": t("navigation") },
        link("users", "#/users"), link("import", "#/import"), link("live", "#/live"), link("prove", "#/prove"),
        element("a", { href: new URL("docs", api.BASE).href, class: "nav-item" }, t("api"))),
      element("div", { class: "shell-tools" }, keyButton(), languageSwitch(), themeSwitch())));
  document.querySelector("header.shell").replaceWith(header);
  document.querySelector(".skip").textContent = t("skip");
}

function logo() {
  return element("img", { src: new URL("icon.svg", import.meta.url).href, alt: "", width: 24, height: 24 });
}

function keyButton() {
  const known = rights();
  if (known.auth === "off") return null;
  const text = known.key ? known.key.name : t("key_none");
  return element("button", { type: "button", class: "btn btn-sm btn-outline-secondary key-button", id: "key-button",
    title: describeRights(), onclick: () => askForKey() },
    icon("key"), element("span", { class: "key-name" }, text),
    known.key && !known.may_write && element("span", { class: "key-scope" }, t("read_only")));
}

function languageSwitch() {
  const options = Object.entries(LANGUAGES).map(([name, own]) =>
    element("option", { value: name, lang: name, selected: name === language() }, own));
  return element("select", { class: "form-select form-select-sm language", id: "language", "aria-label": t("language"),
    onchange: (event) => setLanguage(event.target.value) }, options);
}

const THEMES = ["auto", "light", "dark"];
const THEME_ICONS = { auto: "contrast", light: "sun", dark: "moon" };

function chosenTheme() {
  try {
    const chosen = localStorage.getItem("theme");
    return THEMES.includes(chosen) ? chosen : "auto";
  } catch {
    return "auto";
  }
}

function themeSwitch() {
  const button = element("button", { type: "button", class: "btn-quiet", id: "theme" });
  const draw = () => {
    const theme = chosenTheme();
    button.setAttribute("aria-label", t(`theme_${theme}`));
    button.title = t(`theme_${theme}`);
    button.replaceChildren(icon(THEME_ICONS[theme]));
  };
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(chosenTheme()) + 1) % THEMES.length];
    try {
      localStorage.setItem("theme", next);
    } catch {
      // It cannot be kept, so it is not changed.
    }
    dispatchEvent(new Event("themechange"));
    draw();
  });
  draw();
  return button;
}

// ---- start ----

document.body.append(
  element("a", { class: "skip", href: "#main", onclick: (event) => {
    event.preventDefault(); // the fragment belongs to the routes
    document.getElementById("main").focus();
  } }),
  element("header", { class: "shell" }),
  element("main", { id: "main", tabIndex: -1 }));

addEventListener("popstate", show); // of fragments that change, too
addEventListener("languagechosen", async () => {
  await show();
  document.getElementById("language").focus();
});
addEventListener("rightschange", () => {
  drawHeader(ROUTES.find(({ address }) => address.test(here().path))?.section);
});
// A later read must not take an answer of first_reads.js that is still there.
Promise.all([show(), learnRights()]).finally(() => globalThis.firstReads?.clear());
