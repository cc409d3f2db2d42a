// Starts the first reads of the view of all users before its modules have arrived, which saves a round trip. api.js takes
// the answers. A plain script for that reason: a module runs when all modules that it imports are there.
{
  const isFirstView = /^(#\/?(users)?)?$/.test(location.hash) && history.state === null;
  let key = null;
  try {
    key = sessionStorage.getItem("key");
  } catch {
    // The browser keeps nothing for this page.
  }
  const base = new URL("../../", document.currentScript.src);
  const read = async (path, timeout) => {
    const headers = { Accept: "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(new URL(`.${path}`, base),
      { headers, signal: timeout, redirect: "error", cache: "no-store" });
    const text = await response.text();
    return { response, text, ended: performance.now() };
  };
  globalThis.firstReads = new Map();
  for (const path of isFirstView ? ["/users?limit=50&sort=-id", "/users/count", "/console/key"] : []) {
    const timeout = AbortSignal.timeout(30_000);
    const answer = read(path, timeout);
    answer.catch(() => {}); // api.js looks at it later
    firstReads.set(path, { key, timeout, began: performance.now(), answer });
  }
}

// The first formats of a page take the browser 10 ms or more, and later ones nothing. Now it waits for files anyway.
setTimeout(() => {
  new Intl.DateTimeFormat(navigator.language, { timeStyle: "medium" }).format();
  new Intl.NumberFormat(navigator.language).format(0);
});
