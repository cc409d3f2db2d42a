"""Write docs/screenshots/: each view of the console on a real stack, light and dark, on a desktop and on a phone.

`./run screenshots [VIEW ...]` runs this module.
"""

import io
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import requests
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from testkit.browser import CHROMIUM, launch
from testkit.stack import ROOT, Stack, run, running

FOLDER = ROOT / "docs/screenshots"

COLORS = 128
"""Colors of a picture: few enough that it stays small, and as many as the badges and the smooth letters need."""

USERS = 2000

LOAD_S = 60

DEVICES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 390, "height": 780}, "is_mobile": True},
}

THEMES: tuple[Any, ...] = ("light", "dark")


class View(NamedTuple):
    address: str
    prepare: Callable[[Page], None]


def show_users(page: Page) -> None:
    expect(page.locator("tbody tr").nth(20)).to_be_visible()
    for _ in range(5):  # until Nginx has the page, which takes longer on a busy machine
        if page.locator(".tier-nginx").count() == 2:
            break
        page.get_by_role("button", name="Read again").click()
        expect(page.locator(".users-area")).to_have_attribute("aria-busy", "false")
        page.wait_for_timeout(300)


def edit_a_user(page: Page) -> None:
    show_users(page)
    for number in (2, 3):
        page.locator("tbody tr").nth(number).get_by_role("checkbox").check()
    page.locator("tbody tr").nth(5).get_by_role("button").first.click()
    field = page.locator("tr.editing input").first
    field.fill("")
    page.keyboard.press("Enter")
    expect(page.locator("tr.editing .field-problem").first).to_be_visible()


def lose_a_race(page: Page) -> None:
    show_users(page)
    line = page.locator("tbody tr").nth(1)
    row_id = line.get_attribute("data-id")
    line.get_by_role("button").first.click()
    page.locator("tr.editing input").first.fill("Alice Adams-Brown")
    requests.patch(f"{page.url.partition('#')[0]}users/{row_id}", json={"name": "Alice Cohen"}, timeout=5)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()


def delete_a_user(page: Page) -> None:
    show_users(page)
    page.locator("tbody tr").nth(7).get_by_role("button").last.click()
    expect(page.locator(".toast-message")).to_be_visible()


def show_a_user(page: Page) -> None:
    expect(page.locator("main h1")).not_to_be_empty()
    page.wait_for_load_state("networkidle")


def show_import(page: Page) -> None:
    page.wait_for_load_state("networkidle")


def show_live(page: Page) -> None:
    expect(page.locator("main svg").first).to_be_visible()
    page.wait_for_timeout(3000)


def prove_it(page: Page) -> None:
    page.locator("#prove-start").click()
    expect(page.locator("#prove-verdict")).not_to_be_empty(timeout=60_000)


def show_the_api(page: Page) -> None:
    expect(page.locator(".opblock").first).to_be_visible()


VIEWS = {
    "users": View("", show_users),
    "users-edit": View("", edit_a_user),
    "users-conflict": View("", lose_a_race),
    "users-undo": View("", delete_a_user),
    "user": View("#/users/42", show_a_user),
    "import": View("#/import", show_import),
    "live": View("#/live", show_live),
    "prove": View("#/prove", prove_it),
    "api": View("docs", show_the_api),
}


@contextmanager
def some_load(stack: Stack) -> Iterator[None]:
    """Read and write a little for some time, so that the pictures of the live view have curves."""
    ended = threading.Event()

    def loop() -> None:
        session, number = requests.Session(), 0
        while not ended.wait(0.01):
            number += 1
            edge = stack.edges[number % len(stack.edges)]
            session.get(f"{edge}/users/{10 + number * 7 % 60}", timeout=5)
            if number % 20 == 0:
                session.patch(f"{edge}/users/{10 + number % 60}", json={"name": f"Kim Hill {number}"}, timeout=5)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        ended.wait(LOAD_S)
        yield
    finally:
        ended.set()
        thread.join()


def take(browser: Browser, stack: Stack, name: str) -> None:
    view = VIEWS[name]
    for device, options in DEVICES.items():
        for theme in THEMES:
            with browser.new_context(locale="en-GB", color_scheme=theme, reduced_motion="reduce", **options) as context:
                page = context.new_page()
                page.set_default_timeout(60_000)
                page.goto(f"{stack.edge}/{view.address}")
                view.prepare(page)
                page.mouse.move(0, 0)
                page.evaluate("scrollTo(0, 0)")
                _write(f"{name}-{device}-{theme}", page.screenshot())


def _write(name: str, png: bytes) -> None:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    small = picture.quantize(COLORS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    file = FOLDER / f"{name}.png"
    small.save(file, optimize=True)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size // 1000} kB", flush=True)


def main() -> int:
    wanted = sys.argv[1:] or list(VIEWS)
    if unknown := set(wanted) - set(VIEWS):
        print(f"There is no view {', '.join(sorted(unknown))}; the views are {', '.join(VIEWS)}.", file=sys.stderr)
        return 2
    if not CHROMIUM:
        print("Chromium is missing: apt-get install chromium", file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    expect.set_options(timeout=60_000)  # also on a busy machine
    with running("--edges", "2") as stack, sync_playwright() as playwright:
        seeded = run("velikiy", "--data", str(stack.data), "users", "seed", "--count", str(USERS))
        assert seeded.returncode == 0, seeded.stderr
        with launch(playwright) as browser:
            for name in wanted:
                with some_load(stack) if name == "live" else nullcontext():
                    take(browser, stack, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
