// Texts in the language of the reader, and numbers and dates as that language writes them.

export const LANGUAGES = { en: "English", ru: "Русский" };

let chosen = initial();

function initial() {
  const kept = remembered();
  if (Object.hasOwn(LANGUAGES, kept)) return kept;
  for (const tag of navigator.languages ?? [navigator.language]) {
    const name = tag.toLowerCase().split("-")[0];
    if (Object.hasOwn(LANGUAGES, name)) return name;
  }
  return "en";
}

function remembered() {
  try {
    return localStorage.getItem("language") ?? "";
  } catch {
    return "";
  }
}

export function language() {
  return chosen;
}

// Changes the language of the page. The shell shows the view again.
export function setLanguage(name) {
  chosen = name;
  try {
    localStorage.setItem("language", name);
  } catch {
    // It holds until the page is closed.
  }
  dispatchEvent(new Event("languagechosen"));
}

// Returns the function t(key, values). A text is a string with {names}, or an object with the plural forms that
// Intl.PluralRules chooses by `count`: { one: "{count} user", other: "{count} users" }. Numbers are formatted.
export function translator(texts) {
  return (key, values = {}) => {
    let text = texts[chosen][key];
    if (text === undefined) throw new Error(`no text ${key} in ${chosen}`);
    if (typeof text === "object") text = text[format("PluralRules", chosen).select(values.count)] ?? text.other;
    return text.replace(/\{([a-z_]+)\}/gi, (_, name) => {
      const value = values[name];
      return typeof value === "number" ? number(value) : isolated(String(value ?? ""));
    });
  };
}

// Returns a value that cannot turn the direction of the sentence around it, such as a name in Arabic.
function isolated(value) {
  return /[\u0590-\u08ff\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufefc]/.test(value)
    ? `\u2068${value}\u2069` : value;
}

// Returns the reader's own variety of the chosen language, such as en-GB: numbers and dates differ between varieties.
function variety() {
  return navigator.languages?.find((tag) => tag.toLowerCase().split("-")[0] === chosen) ?? chosen;
}

// Returns a formatter of Intl. To make one takes as long as to draw ten rows, so each is made once.
const formats = new Map();
function format(kind, language, options) {
  const name = JSON.stringify([kind, language, options]);
  if (!formats.has(name)) formats.set(name, new Intl[kind](language, options));
  return formats.get(name);
}

export function number(value, digits = 0) {
  return format("NumberFormat", variety(), { maximumFractionDigits: digits }).format(value);
}

// Returns a moment in the time zone of the reader: the time of day for today, else with the date.
export function moment(text) {
  const date = new Date(text);
  const isToday = date.toDateString() === new Date().toDateString();
  const style = isToday ? { timeStyle: "medium" } : { dateStyle: "medium", timeStyle: "short" };
  return format("DateTimeFormat", variety(), style).format(date);
}

// Returns milliseconds with as many digits as they deserve.
export function milliseconds(value) {
  return number(value, value < 10 ? 1 : 0);
}
