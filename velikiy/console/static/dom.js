// Makes elements. Strings become text nodes, so nothing of a row is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

// Returns an element. A property that begins with "on" is a listener, "class" and names with a dash are attributes, and
// other names are properties of the element. null, undefined and false among the children are left out.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  set(made, properties);
  made.append(...nodes(children));
  return made;
}

// Returns an element of SVG, whose properties are attributes.
export function svg(tag, properties = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...nodes(children));
  return made;
}

const ICONS = {
  contrast: "M8 2a6 6 0 1 0 0 12A6 6 0 0 0 8 2ZM8 2v12M10.5 3v10M12.5 5v6",
  moon: "M13.5 9.6A6 6 0 0 1 6.4 2.5a6 6 0 1 0 7.1 7.1Z",
  sun: "M8 5a3 3 0 1 0 0 6 3 3 0 0 0 0-6ZM8 1v1.4M8 13.6V15M1 8h1.4M13.6 8H15M3 3l1 1M12 12l1 1M3 13l1-1M12 4l1-1",
  key: "M10.2 9.6a3.8 3.8 0 1 0-3.6-2.5L2 11.7V14h2.6v-1.6h1.7v-1.7l1.5-1.4c.7.2 1.6.3 2.4.3ZM11.3 4.7v.1",
  search: "M7 12A5 5 0 1 0 7 2a5 5 0 0 0 0 10ZM10.6 10.6 14 14",
  pencil: "M10.8 2.7l2.5 2.5L5.5 13 2.5 13.5 3 10.5ZM9.2 4.3l2.5 2.5",
  trash: "M2.5 4.5h11M6 4.5V2.8h4v1.7M4 4.5l.6 9h6.8l.6-9M6.7 7v4M9.3 7v4",
  plus: "M8 3v10M3 8h10",
  close: "M4 4l8 8M12 4l-8 8",
  previous: "M10 3 5 8l5 5",
  next: "M6 3l5 5-5 5",
  reload: "M13.5 8a5.5 5.5 0 1 1-1.6-3.9M12.5 1.5v3h-3",
  up: "M8 13V3M4 7l4-4 4 4",
  down: "M8 3v10M4 9l4 4 4-4",
  alert: "M8 2.5 14.5 13.5H1.5ZM8 6.8v3M8 11.7v.1",
  users: "M6 8a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5ZM1.5 13.5c0-2.5 2-4 4.5-4s4.5 1.5 4.5 4"
    + "M10.5 3.2a2.5 2.5 0 0 1 0 4.6M12 9.9c1.5.5 2.5 1.8 2.5 3.6",
};

const icons = new Map(); // by name. A table has a hundred icons, and a copy takes a tenth of the time

// Returns an icon, which a screen reader skips: the text beside it, or the label of its button, has the meaning.
export function icon(name) {
  if (!icons.has(name)) icons.set(name, drawIcon(name));
  return icons.get(name).cloneNode(true);
}

function drawIcon(name) {
  const path = svg("path", { d: ICONS[name], fill: "none", stroke: "currentColor", "stroke-width": "1.5",
    "stroke-linecap": "round", "stroke-linejoin": "round" });
  return svg("svg", { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" }, path);
}

// Changes properties of an element, as `element` reads them.
export function set(made, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(made.dataset, value);
    else if (name === "class" || name === "for" || name === "role" || name.includes("-")) {
      if (value === null || value === undefined || value === false) made.removeAttribute(name);
      else made.setAttribute(name, value);
    } else made[name] = value;
  }
}

function nodes(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

let region = null;

// Says a text to screen readers: the number of results, or what was done.
export function announce(text) {
  if (!region) {
    region = element("div", { class: "visually-hidden", role: "status", "aria-live": "polite" });
    document.body.append(region);
  }
  region.textContent = "";
  // A reader notices a change, and not a text that stays the same.
  setTimeout(() => { region.textContent = text; }, 50);
}

// Adds a style sheet of a view to the page, once.
export function loadStyle(name) {
  const href = new URL(name, import.meta.url).href;
  const known = [...document.querySelectorAll('link[rel="stylesheet"]')].find((link) => link.href === href);
  if (known) return Promise.resolve();
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = href;
  return new Promise((resolve) => {
    link.onload = link.onerror = resolve;
    document.head.append(link);
  });
}
