// Requests to the API of this service.

export const BASE = new URL("../../", import.meta.url); // with the path prefix, whatever the page's own address is

const TIMEOUT_MS = 30_000;
const KEY = "key"; // in sessionStorage: for this tab only, until it is closed

let askForKey = null; // by the shell: returns a promise of a key, or of null if the person has none
let asking = null; // one question at a time, however many requests were refused

export function onUnauthorized(ask) {
  askForKey = ask;
}

let key = keptKey();

function keptKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function apiKey() {
  return key;
}

export function setApiKey(other) {
  key = other;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // It holds until the page is left.
  }
  dispatchEvent(new Event("keychange"));
}

// Returns the full address of a path of the API, such as /users/7.
export function address(path) {
  return new URL(`.${path}`, BASE);
}

// Sends a request, and returns { ok, status, headers, body, problem, source, aborted }. It never throws.
//
// options.body: an object, sent as JSON; a text or a Blob, sent as it is. options.isFile: the body of the answer becomes
// a Blob. problem: { title, detail, errors } of a failed request; without any answer its status is 0 and `problem.kind`
// is "away" or "slow". aborted: `signal` has fired, so nobody waits for the answer.
// A write carries what the rules against foreign pages want (velikiy/http/browsers.py): a JSON media type, and the
// browser adds Sec-Fetch-Site.
export async function request(method, path, options = {}) {
  const response = await send(method, path, options);
  if (response.status !== 401 || !askForKey || options.asks === false) return response;
  asking ??= askForKey().finally(() => { asking = null; });
  return (await asking) ? send(method, path, options) : response;
}

async function send(method, path, options) {
  const sent = headersOf(options);
  const first = method === "GET" ? takeFirstRead(path, sent) : null;
  const slow = first?.timeout ?? AbortSignal.timeout(options.timeout ?? TIMEOUT_MS);
  const began = first?.began ?? performance.now();
  try {
    const { response, content, ended } = await (first ? first.answer : exchange(method, path, sent, slow, options));
    return {
      ok: response.ok,
      status: response.status,
      headers: response.headers,
      body: content,
      problem: response.ok ? null : problemOf(response, content),
      source: sourceOf(response.headers, ended - began),
      aborted: options.signal?.aborted ?? false,
    };
  } catch {
    const kind = slow.aborted ? "slow" : "away";
    return {
      ok: false,
      status: 0,
      headers: new Headers(),
      body: null,
      problem: { kind, status: 0, title: "", detail: "", errors: [] },
      source: { tier: null, age: null, milliseconds: performance.now() - began },
      aborted: options.signal?.aborted ?? false,
    };
  }
}

function headersOf({ body, headers = {} }) {
  const sent = new Headers({ Accept: "application/json", ...headers });
  if (key && !sent.has("Authorization")) sent.set("Authorization", `Bearer ${key}`);
  if (body !== undefined && !sent.has("Content-Type")) sent.set("Content-Type", "application/json");
  return sent;
}

async function exchange(method, path, headers, slow, { body, signal, isFile = false }) {
  const response = await fetch(address(path), {
    method,
    headers,
    body: body === undefined || typeof body === "string" || body instanceof Blob ? body : JSON.stringify(body),
    signal: signal ? AbortSignal.any([signal, slow]) : slow,
    redirect: "error",
    cache: "no-store", // the badge shows the tiers of the service, not the browser's own cache
  });
  const content = isFile && response.ok ? await response.blob() : contentOf(response, await response.text());
  return { response, content, ended: performance.now() };
}

// Returns the read of this path that first_reads.js has started, once, and null if there is none.
function takeFirstRead(path, headers) {
  const first = globalThis.firstReads?.get(path);
  globalThis.firstReads?.delete(path);
  if (!first || headers.get("Authorization") !== (first.key && `Bearer ${first.key}`)) return null;
  const answer = first.answer.then(({ response, text, ended }) =>
    ({ response, content: contentOf(response, text), ended }));
  return { ...first, answer };
}

function contentOf(response, text) {
  return text && /json/.test(response.headers.get("Content-Type") ?? "") ? JSON.parse(text) : text;
}

function problemOf(response, content) {
  const members = typeof content === "object" && content !== null ? content : {};
  return {
    kind: String(members.type ?? "").split("/").at(-1),
    needsScope: /insufficient_scope/.test(response.headers.get("WWW-Authenticate") ?? ""),
    status: response.status,
    title: members.title ?? response.statusText,
    detail: members.detail ?? "",
    errors: members.errors ?? [],
    requestId: members.request_id ?? response.headers.get("X-Request-Id") ?? "",
    retryAfter: Number(response.headers.get("Retry-After")) || null,
  };
}

// Returns random bytes as hexadecimal digits, for an Idempotency-Key. crypto.randomUUID needs https or loopback.
export function randomHex(bytes = 16) {
  return [...crypto.getRandomValues(new Uint8Array(bytes))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Returns which tier answered, by the headers that every answer of the edge has (docs/api.md).
export function sourceOf(headers, milliseconds) {
  const age = headers.get("Age");
  return { tier: tierOf(headers), age: age === null ? null : Number(age), milliseconds };
}

function tierOf(headers) {
  const status = headers.get("X-Cache-Status");
  if (status === "HIT") return "nginx";
  if (status === "STALE") return "stale";
  const passed = headers.get("Cache-Status") ?? "";
  if (/\bredis; hit/.test(passed)) return "redis";
  return /\bredis\b/.test(passed) || status === "MISS" || status === "EXPIRED" ? "postgres" : null;
}

// Returns the cursor of the next page, or "" on the last page (the header Link).
export function nextCursor(headers) {
  const next = /<([^>]*)>\s*;\s*rel="?next"?/.exec(headers.get("Link") ?? "");
  return next ? new URL(next[1], BASE).searchParams.get("cursor") ?? "" : "";
}
