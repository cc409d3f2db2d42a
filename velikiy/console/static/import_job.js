// Sends a file in pieces. The service reads a piece as far as it has complete rows, carries it out as one transaction,
// and says where the next one begins. So nothing is half done, and the service keeps nothing of the file.

import { randomHex, request } from "./api.js";

const MAX_BYTES = 1_900_000; // with the options and the head of the file below the 2 MB of the service
const FIRST_BYTES = 256 * 1024;
const MIN_BYTES = 64 * 1024;
const FIRST_ROWS = 200;
const MIN_ROWS = 50;
const MAX_ROWS = 1000; // of a piece; the service takes no more
const PIECE_MS = 1000; // a piece should take about as long, far below the time that the service gives it
const MAX_TRIES = 8;
const MAX_PAUSE_MS = 10_000;
const TIMEOUT_MS = 60_000;
const KEPT_MS = 23 * 3600_000; // the service repeats the response to an Idempotency-Key for 24 hours
const KEPT = "import";
const FINGERPRINT_BYTES = 64 * 1024;

const TYPE = { "Content-Type": "application/octet-stream" };

// Returns the answer about the columns and the first rows.
export function firstPreview(content, options) {
  const isLast = content.size <= MAX_BYTES;
  const sent = body({ ...options, is_last: isLast }, content.slice(0, MAX_BYTES));
  return request("POST", "/console/import/preview", { body: sent, headers: TYPE, timeout: TIMEOUT_MS });
}

function body(options, ...parts) {
  return new Blob([`${JSON.stringify(options)}\n`, ...parts]);
}

export class Import {
  // earlier: { id, plan } of an import of this file that was interrupted. The pieces of its plan, [bytes, rows] each, are
  // sent again as they were, so that the service recognises them and carries none out twice.
  constructor(content, options, { isWhole, earlier, changed }) {
    this.content = content;
    this.options = options;
    this.isWhole = isWhole;
    this.id = earlier?.id ?? randomHex();
    this.plan = earlier?.plan ?? [];
    this.sentPieces = 0;
    this.changed = changed;
    this.state = "running";
    this.problem = null;
    this.counts = { created: 0, updated: 0, unchanged: 0, skipped: 0, rejected: 0 };
    this.rejects = [];
    this.reasons = [];
    this.offset = 0;
    this.place = { head: 0, line: 0, done: 0 };
    this.size = isWhole ? content.size : Math.min(FIRST_BYTES, content.size);
    this.rows = FIRST_ROWS;
  }

  get progress() {
    return this.state === "done" || !this.content.size ? 1 : this.offset / this.content.size;
  }

  stop() {
    this.isStopping = true;
  }

  // Imports to the end, or until it is stopped or fails. After that it can be called again, to continue.
  async run() {
    try {
      await this.sendAll();
    } catch (error) { // of this page, or of a file that cannot be read any more
      reportError(error);
      this.enter("failed", { kind: "page", detail: String(error.message ?? error), errors: [] });
    }
  }

  async sendAll() {
    this.isStopping = false;
    this.file ??= await fingerprint(this.content);
    this.enter("running");
    for (;;) {
      if (this.isStopping) return this.enter("stopped");
      if (this.sentPieces < this.plan.length) [this.size, this.rows] = this.plan[this.sentPieces];
      else this.plan.push([this.size, this.rows]);
      keep(this); // before it is sent
      const answer = await this.send();
      if (!answer) return this.enter("stopped");
      if (!answer.ok) return this.enter(isFinal(answer.status) ? "failed" : "stopped", answer.problem);
      this.sentPieces++;
      const result = answer.body;
      this.take(result, answer.source.milliseconds);
      if (result.is_end) {
        forget();
        return this.enter("done");
      }
      if (!result.read && result.done === this.place.done) {
        if (this.size >= MAX_BYTES) return this.enter("failed", { detail: "", kind: "row", errors: [] });
        this.size = Math.min(MAX_BYTES, this.size * 2);
      }
      this.place = { head: result.head, line: result.line, done: result.done };
      this.show();
    }
  }

  // Sends the next piece until an answer shows what became of it. The Idempotency-Key lets it happen once.
  async send() {
    const piece = this.content.slice(this.offset, this.offset + this.size);
    const head = this.offset ? this.content.slice(0, this.place.head) : new Blob();
    const isLast = this.offset + this.size >= this.content.size;
    const sent = body({ ...this.options, ...this.place, head: head.size, is_last: isLast, rows: this.rows }, head, piece);
    const key = `${this.id}-${this.sentPieces}`;
    for (let tries = 1; ; tries++) {
      const answer = await request("POST", "/console/import",
        { body: sent, headers: { ...TYPE, "Idempotency-Key": key }, timeout: TIMEOUT_MS });
      const isPassing = answer.status === 0 || answer.status >= 500 || answer.status === 429 || answer.status === 408 ||
        answer.problem?.kind === "in-flight";
      if (!isPassing || tries === MAX_TRIES) {
        if (this.state === "waiting") this.enter("running");
        return answer;
      }
      this.enter("waiting", answer.problem);
      await new Promise((resolve) => { setTimeout(resolve, answer.problem.retryAfter * 1000 || Math.min(MAX_PAUSE_MS, 500 * 2 ** tries)); });
      if (this.isStopping) return null;
    }
  }

  take(result, milliseconds) {
    for (const name of Object.keys(this.counts)) this.counts[name] += result[name];
    if (result.rejects) {
      this.rejects.push(new Blob([result.rejects]));
      for (const line of result.rejects.split("\n")) {
        if (this.reasons.length >= 20) break;
        if (line) this.reasons.push(JSON.parse(line));
      }
    }
    this.offset += result.read;
    const rows = result.created + result.updated + result.unchanged + result.skipped + result.rejected;
    const timely = Math.round((this.rows * PIECE_MS) / Math.max(milliseconds, 1));
    this.rows = Math.min(MAX_ROWS, this.rows * 2, Math.max(MIN_ROWS, timely));
    if (!this.isWhole && rows && result.read) {
      const wanted = Math.ceil((result.read / rows) * this.rows * 1.1);
      this.size = Math.min(MAX_BYTES, Math.max(MIN_BYTES, wanted));
    }
  }

  enter(state, problem = null) {
    this.state = state;
    this.problem = problem;
    this.show();
  }

  // A view that cannot be drawn does not end the import.
  show() {
    try {
      this.changed();
    } catch (error) {
      reportError(error);
    }
  }
}

// Returns whether the service has refused the piece, and would refuse it again.
function isFinal(status) {
  return status >= 400 && status < 500 && status !== 401 && status !== 403;
}

// ---- an import that was interrupted with its page ----

// The browser keeps the length of the file and a hash of its ends, the sizes of the pieces, and the options.
// The options contain names of columns of the file. Values of its rows are not kept.
function keep({ id, file, plan, options }) {
  write({ id, file, plan, options, at: Date.now() });
}

function forget() {
  write(null);
}

function write(value) {
  try {
    if (value) localStorage.setItem(KEPT, JSON.stringify(value));
    else localStorage.removeItem(KEPT);
  } catch {
    // The browser keeps nothing: an interrupted import begins at its first row, and its rows are found to exist.
  }
}

// Returns { id, plan, options } of the import of this file that was interrupted, or null.
export async function unfinished(content) {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "null");
    if (!kept || Date.now() - kept.at > KEPT_MS) return null;
    return kept.file === await fingerprint(content) && kept.plan.length ? kept : null;
  } catch {
    return null;
  }
}

async function fingerprint(content) {
  const ends = [content.slice(0, FINGERPRINT_BYTES), content.slice(-FINGERPRINT_BYTES)];
  let hash = 0x811c9dc5; // FNV-1a; crypto.subtle needs https
  for (const byte of new Uint8Array(await new Blob(ends).arrayBuffer())) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return `${content.size}-${hash}`;
}
