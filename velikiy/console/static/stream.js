// The stream of GET /console/live: samples and the state of every part, as server-sent events. EventSource cannot send
// an API key, so fetch reads the stream.

import { address, apiKey } from "./api.js";

const QUIET_MS = 40_000; // without even a sign of life, the connection is lost
const PAUSES_MS = [1000, 2000, 4000, 8000];

// Reads events until `signal` fires, and connects again whenever the stream ends. A hidden page has no stream: a browser
// opens few connections to one host, and streams of forgotten tabs would take them all.
//
// event: receives each event. broken: receives the status, 0 without a response, each time that the stream is lost.
export function follow({ event, broken, signal }) {
  let controller = null, last = "", failures = 0, timer = 0;

  async function read() {
    controller = new AbortController();
    const own = controller;
    let quiet = setTimeout(() => own.abort(), QUIET_MS);
    let status = 0;
    try {
      const headers = { Accept: "text/event-stream" };
      if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
      if (last) headers["Last-Event-ID"] = last;
      const response = await fetch(address("/console/live"), { headers, cache: "no-store", signal: own.signal });
      status = response.status;
      if (!response.ok) throw new Error("refused");
      const decoder = new TextDecoder();
      let text = "";
      for (const reader = response.body.getReader();;) {
        const { done, value } = await reader.read();
        if (done) break;
        clearTimeout(quiet);
        quiet = setTimeout(() => own.abort(), QUIET_MS);
        text += decoder.decode(value, { stream: true });
        const parts = text.split("\n\n");
        text = parts.pop();
        for (const part of parts) take(part);
      }
      status = -1; // it has ended in order
    } catch {
      // The state below says what is known.
    }
    clearTimeout(quiet);
    if (own !== controller) return; // the page was hidden, or left
    controller = null;
    if (status !== -1) broken(status);
    timer = setTimeout(read, status === -1 ? 200 : PAUSES_MS[Math.min(failures++, PAUSES_MS.length - 1)]);
  }

  function take(part) {
    const fields = Object.fromEntries(part.split("\n").map((line) => line.split(/: ?(.*)/s)));
    if (fields.id) last = fields.id;
    if (!fields.data) return;
    const data = JSON.parse(fields.data);
    failures = 0;
    try {
      event(data);
    } catch (error) { // of the view: the stream is sound
      reportError(error);
    }
  }

  function stop() {
    clearTimeout(timer);
    const old = controller;
    controller = null;
    old?.abort();
  }

  function look() {
    stop();
    if (!document.hidden) read();
  }

  document.addEventListener("visibilitychange", look, { signal });
  addEventListener("keychange", look, { signal });
  signal.addEventListener("abort", stop);
  look();
}
