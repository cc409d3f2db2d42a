// Rows as a CSV file that this browser saves.

import { element } from "./dom.js";

const COLUMNS = ["id", "name", "email", "created_at", "updated_at", "version"];

// Returns the rows as RFC 4180 has them, in the columns of an export of all users (docs/import-export.md).
export function csvOf(rows) {
  const cell = (value) => (/[",\r\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  return [COLUMNS, ...rows.map((row) => COLUMNS.map((name) => row[name]))]
    .map((cells) => `${cells.map(cell).join(",")}\r\n`).join("");
}

export function saveCsv(name, rows) {
  const address = URL.createObjectURL(new Blob([csvOf(rows)], { type: "text/csv" }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
