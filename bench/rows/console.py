"""How soon the console shows its rows in a real browser, and how long its work with many users takes."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from playwright.sync_api import Browser, CDPSession, FilePayload, Page, expect, sync_playwright

from bench.measure import Line, Ratio, Result
from bench.rows.base import Bench
from testkit.browser import CHROMIUM, launch

LOADS = 20

CALM_MS = 1500
"""A new window of Chromium loads parts of its own, about 400 files, which would compete with the page."""

MAX_SHOWN_MS = 300
MAX_KB = 200

IMPORTED = 100_000
REJECT_EACH = 1000
IMPORT_S = 600

DOMAIN = "console.bench.example"

WATCH = """
// Calls `done` when the table has other rows than `before`, and the browser has painted them.
globalThis.whenRowsAreShown = (before, done) => {
  const look = () => {
    const row = document.querySelector("tbody tr");
    if (!row || row === before) return;
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now())));
  };
  const observer = new MutationObserver(look);
  observer.observe(document, { childList: true, subtree: true });
};
globalThis.firstRows = new Promise((resolve) => whenRowsAreShown(null, resolve));

// Returns the milliseconds from an action to its rows, and counts frames without a row on the way: flicker.
globalThis.framesWithoutRows = 0;
globalThis.timeOf = (act) => new Promise((resolve) => {
  const began = performance.now();
  let isOver = false;
  const look = () => {
    framesWithoutRows += !document.querySelector("tbody tr");
    if (!isOver) requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
  whenRowsAreShown(document.querySelector("tbody tr"), (ended) => {
    isOver = true;
    resolve(ended - began);
  });
  act();
});
"""

STEPS = {
    "next page": 'document.getElementById("page-next").click()',
    "previous page": 'document.getElementById("page-previous").click()',
    "by id, from the other end": 'document.getElementById("sort-id").click()',
    "by name": 'document.getElementById("sort-name").click()',
    "by name, from the other end": 'document.getElementById("sort-name").click()',
    "by e-mail": 'document.getElementById("sort-email").click()',
    "by e-mail, from the other end": 'document.getElementById("sort-email").click()',
    "by date": 'document.getElementById("sort-created_at").click()',
    "by date, from the other end": 'document.getElementById("sort-created_at").click()',
}

SEARCHES = ("ali", "alice", "alice ad", "user 77", "")


def load(bench: Bench) -> Result:
    """Measure the page at `/` from its request until its rows are painted, with an empty cache of the browser each
    time.
    """
    if not CHROMIUM:
        return skipped("console", "rows shown, with an empty cache")
    shown, size, requests = [], [], []
    with browser() as chromium:
        for number in range((5 if bench.quick else LOADS) + 1):
            bench.show(f"load {number}")
            with new_page(chromium) as page:
                sizes = transferred(page.context.new_cdp_session(page))
                page.wait_for_timeout(CALM_MS)
                page.goto(f"{bench.peers.stack.edge}/")
                milliseconds = float(page.evaluate("firstRows"))
                if number:  # the first one fills the caches of the service
                    shown.append(milliseconds)
                    page.wait_for_load_state("networkidle")
                    size.append(sum(sizes) / 1000)
                    requests.append(len(sizes))
    return Result(
        [
            Line("console", "rows shown, with an empty cache", Ratio.of(shown), MAX_SHOWN_MS, at_most=True, unit="ms"),
            Line("console", "transferred", Ratio.of(size), MAX_KB, at_most=True, unit="kB"),
        ],
        more={"shown_ms": [round(each) for each in shown], "requests": statistics.median(requests)},
    )


def work(bench: Bench) -> Result:
    """Measure the table of all users step by step, and the import of a file through the page."""
    if not CHROMIUM:
        return skipped("console-work", "table and import")
    with browser() as chromium, new_page(chromium) as page:
        lines = [*table(bench, page), *import_file(bench, page)]
    return Result(lines)


def table(bench: Bench, page: Page) -> Iterator[Line]:
    users = f"of {bench.users:,} users"
    page.goto(f"{bench.peers.stack.edge}/")
    page.evaluate("firstRows")
    for name, action in STEPS.items():
        bench.show(name)
        found = []
        for _ in range(1 if name.startswith("by") else 5):
            found.append(page.evaluate(f"timeOf(() => {action})"))
            check_table(page)
        yield line(f"table {users}: {name}", found)
    page.evaluate("timeOf(() => { location.hash = '#/users?sort=id' })")
    check_table(page)
    for text in SEARCHES:
        bench.show(f"search {text}")
        typed = f'search.value = "{text}"; search.dispatchEvent(new Event("input"))'
        # With the pause after which a search begins (velikiy/console/static/users.js, TYPING_MS).
        found = [page.evaluate(f'timeOf(() => {{ const search = document.getElementById("search"); {typed} }})')]
        check_table(page)
        expect(page.locator("#count")).not_to_be_empty(timeout=30_000)
        yield line(f"table {users}: search “{text}”" if text else f"table {users}: search cleared", found)
    assert page.evaluate("framesWithoutRows") == 0, "the table flickered"


def check_table(page: Page) -> None:
    expect(page.locator(".users-area")).to_have_attribute("aria-busy", "false", timeout=30_000)
    expect(page.locator(".notice")).to_be_hidden()


def import_file(bench: Bench, page: Page) -> Iterator[Line]:
    count = IMPORTED // 10 if bench.quick else IMPORTED
    rejected = count // REJECT_EACH
    addresses = ("nonsense" if n % REJECT_EACH == 7 else f"p{n}@{DOMAIN}" for n in range(count))
    content = "name,email\n" + "".join(f"Person {n},{address}\n" for n, address in enumerate(addresses))
    file: FilePayload = {"name": "people.csv", "mimeType": "text/csv", "buffer": content.encode()}
    page.goto(f"{bench.peers.stack.edge}/#/import")
    page.locator("#import-file").set_input_files(file)
    button = page.get_by_role("button", name="Import", exact=True)
    expect(button).to_be_enabled(timeout=30_000)
    steps: list[float] = []
    try:
        began = float(page.evaluate("performance.now()"))
        button.click()
        until(page, lambda: note_progress(page, steps, bench.show))
        took = (float(page.evaluate("performance.now()")) - began) / 1000
        expect(page.locator(".count-created dd")).to_have_text(f"{count - rejected:,}")
        expect(page.locator(".count-rejected dd")).to_have_text(f"{rejected:,}")
        with page.expect_download() as download:
            page.get_by_role("button", name="Download the rejected rows").click()
        assert len(download.value.path().read_text().splitlines()) == rejected
        assert steps == sorted(steps), "the progress went back"
    finally:
        bench.peers.stack.sql("DELETE FROM users WHERE email LIKE %s", f"%@{DOMAIN}")
    yield Line("console-work", f"import of {count:,} rows", Ratio.of([took]), unit="s")
    yield Line("console-work", "import of rows", Ratio.of([count / took]), unit="/s")


def note_progress(page: Page, steps: list[float], show: Callable[[str], None]) -> bool:
    value = page.evaluate('document.querySelector(".import-progress")?.value ?? null')
    if value is not None:
        steps.append(value)
        show(f"import: {value:.0%}")
    return page.get_by_role("link", name="Go to the users").is_visible()


def until(page: Page, is_over: Callable[[], bool]) -> None:
    for _ in range(IMPORT_S * 5):
        if is_over():
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"the import did not end within {IMPORT_S} s")


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright, launch(playwright) as chromium:
        yield chromium


@contextmanager
def new_page(chromium: Browser) -> Iterator[Page]:
    """Open a page in a context of its own, whose cache is empty."""
    with chromium.new_context(locale="en-GB", viewport={"width": 1280, "height": 800}) as context:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.add_init_script(WATCH)
        yield page


def transferred(session: CDPSession) -> list[int]:
    """Return a list that gets the bytes of each response, as they were sent."""
    sizes: list[int] = []
    session.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    session.send("Network.enable")
    return sizes


def line(what: str, milliseconds: Sequence[float]) -> Line:
    return Line("console-work", what, Ratio.of(milliseconds), unit="ms")


def skipped(row: str, what: str) -> Result:
    return Result([Line(row, what, None, skipped="skipped: there is no chromium")])
