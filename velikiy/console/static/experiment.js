// The experiment of Prove it: writes one row again and again, reads it through every edge meanwhile, and judges each
// read. No page is drawn here.

export const SECONDS = 20;
export const TTL_S = 5; // of the cache-aside design (bench/cache_aside/nginx.conf)

const WRITE_EVERY_MS = [700, 1500];
const READ_EVERY_MS = 130;
const MAX_READS_PER_S = 40; // of all edges together
const OWN_EMAIL = /^prove-it-[0-9a-f]{12}@example\.com$/;
const KEPT = "prove-it"; // in localStorage: the e-mail address of the row while it exists

// Runs the experiment and fills `run`. Returns { problem } if it could not begin.
//
// run.writes: [{ version, sent, done }], run.reads: [{ edge, start, end, version, tier, isStale, aside }], in seconds
// since the beginning. aside: { version, tier, isStale }, what a cache-aside service would have answered.
export async function perform({ api, edges, run, signal, seconds = SECONDS }) {
  const stop = new AbortController();
  const ends = AbortSignal.any([signal, stop.signal]);
  const email = `prove-it-${api.randomHex(6)}@example.com`;
  keep(email); // before the row exists: a page that is closed right now never learns its id
  const made = await api.request("POST", "/users", { body: { name: nameOf(1), email } });
  if (!made.ok) return { problem: made.problem };
  const path = `/users/${(made.headers.get("Location") ?? "").split("/").at(-1)}`;
  const leave = () => remove(api, path, true);
  addEventListener("pagehide", leave);
  const began = performance.now();
  const now = () => (performance.now() - began) / 1000;
  const judge = new Judge();
  judge.know(1);
  run.writes.push({ version: 1, sent: 0, done: 0 });

  async function write() {
    for (let version = 2; !ends.aborted; version++) {
      await pause(WRITE_EVERY_MS[0] + Math.random() * (WRITE_EVERY_MS[1] - WRITE_EVERY_MS[0]), ends);
      if (ends.aborted || now() > seconds - 0.5) return;
      const one = { version, sent: now(), done: null, failed: false };
      run.writes.push(one);
      const answer = await api.request("PUT", path, { body: { name: nameOf(version), email }, asks: false });
      one.done = now();
      one.failed = !answer.ok; // its outcome may be unknown: reads may show the version, and need not
      if (answer.ok) judge.know(version);
    }
  }

  async function read(edge, every) {
    while (!ends.aborted && now() < seconds) {
      const start = now(), floor = judge.floor();
      const answer = await api.request("GET", edge.path(path), { signal: ends, asks: false });
      if (ends.aborted) return;
      const end = now(), version = answer.ok ? versionOf(answer.body) : null;
      run.reads.push({ edge, start, end, tier: answer.source.tier, version, ...judge.read(edge, start, end, version, floor) });
      await pause(every - (now() - start) * 1000, ends);
    }
  }

  const every = Math.max(READ_EVERY_MS, 1000 * edges.length / MAX_READS_PER_S);
  try {
    await Promise.all([write(), ...edges.map((edge) => read(edge, every))]);
  } finally {
    stop.abort();
    removeEventListener("pagehide", leave);
    await remove(api, path);
  }
  return {};
}

// Deletes the row of an experiment whose page was closed midway, or whose last request failed.
export async function cleanUp(api) {
  const email = kept();
  if (!email) return;
  const answer = await api.request("GET", `/users?email=${encodeURIComponent(email)}`, { asks: false });
  if (!answer.ok) return;
  if (answer.body.length) await remove(api, `/users/${answer.body[0].id}`);
  else keep("");
}

async function remove(api, path, isLeaving = false) {
  if (isLeaving) { // the browser sends this request after the page is gone
    const headers = api.apiKey() ? { Authorization: `Bearer ${api.apiKey()}` } : {};
    fetch(api.address(path), { method: "DELETE", headers, keepalive: true }).catch(() => {});
    return;
  }
  const answer = await api.request("DELETE", path, { asks: false });
  if (answer.ok || answer.status === 404) keep("");
}

function keep(email) {
  try {
    if (email) localStorage.setItem(KEPT, email);
    else localStorage.removeItem(KEPT);
  } catch {
    // Then only this page deletes the row.
  }
}

function kept() {
  try {
    return OWN_EMAIL.exec(localStorage.getItem(KEPT) ?? "")?.[0];
  } catch {
    return null;
  }
}

function nameOf(version) {
  return `Prove it, version ${version}`;
}

function versionOf(row) {
  return Number(/^Prove it, version (\d+)$/.exec(row?.name ?? "")?.[1]) || null;
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    if (signal.aborted) return resolve();
    const timer = setTimeout(resolve, Math.max(0, ms));
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
    return undefined;
  });
}

// Judges by one clock, the page's: a read is stale if it returns an older version than one that was acknowledged, or
// that another read had returned, before this read began.
export class Judge {
  #known = 0;
  #acknowledged = 0;
  #entries = new Map(); // of the computed service: what the Nginx of each edge has stored
  #inRedis = 0;
  #asideSeen = 0;

  // A write was acknowledged.
  know(version) {
    this.#known = Math.max(this.#known, version);
    this.#acknowledged = Math.max(this.#acknowledged, version);
  }

  // Call it when a read begins.
  floor() {
    return { real: this.#known, aside: Math.max(this.#acknowledged, this.#asideSeen) };
  }

  read(edge, start, end, version, floor) {
    if (version === null) return { isStale: false, aside: null };
    this.#known = Math.max(this.#known, version);
    return { isStale: version < floor.real, aside: this.#aside(edge, start, end, version, floor.aside) };
  }

  // Returns what a cache-aside service would have answered at the same moment: Nginx serves what it has for TTL_S,
  // whatever was written; otherwise it fetches. An app finds the row in Redis, or reads PostgreSQL if a write has
  // deleted the key. Both give the newest version, which the real read has just returned. The races of the design
  // (a slow reader that fills Redis with an old row) are left out, so this is its best case.
  #aside(edge, start, end, version, floor) {
    let entry = this.#entries.get(edge), tier = "nginx";
    if (!entry || start - entry.storedAt >= TTL_S) {
      tier = this.#inRedis === version ? "redis" : "postgres";
      this.#inRedis = Math.max(this.#inRedis, version);
      entry = { version, storedAt: end };
      this.#entries.set(edge, entry);
    }
    this.#asideSeen = Math.max(this.#asideSeen, entry.version);
    const isStale = entry.version < floor;
    return { version: entry.version, tier, isStale };
  }
}
