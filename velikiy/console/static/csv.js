// Files that this browser saves, such as rows as CSV.

import { element } from "./dom.js";

const COLUMNS = ["id", "name", "email", "created_at", "updated_at", "version"];

const BOM = "\ufeff"; // or Excel takes the letters for those of another encoding
const FORMULA = /^'*[=+\-@\t\r\n＝＋－＠]/; // as velikiy/bulk/readers.py has it

// Returns the rows as an export of all users for Excel has them (docs/import-export.md). An import removes the byte order
// mark and the apostrophes before formulas.
export function csvOf(rows) {
  const cell = (value) => {
    const text = FORMULA.test(String(value)) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return BOM + [COLUMNS, ...rows.map((row) => COLUMNS.map((name) => row[name]))]
    .map((cells) => `${cells.map(cell).join(",")}\r\n`).join("");
}

export function saveCsv(name, rows) {
  saveFile(name, new Blob([csvOf(rows)], { type: "text/csv" }));
}

export function saveFile(name, content) {
  const address = URL.createObjectURL(content);
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
