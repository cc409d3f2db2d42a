"""The import of a file in the browser, and the download of all users."""

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import FilePayload, Page, Route, expect

from testkit.browser import Visit, serious_findings
from testkit.stack import Stack

Open = Callable[..., Visit]

_numbers = count(1)

IMPORT_MS = 60_000
"""The time of an import on a busy machine."""


@pytest.fixture
def domain(stack: Stack) -> Iterator[str]:
    """A domain for the addresses of one test, whose users are deleted afterwards."""
    domain = f"page{next(_numbers)}.example.com"
    yield domain
    stack.sql("DELETE FROM users WHERE email LIKE %s", f"%@{domain}")


def choose(page: Page, content: bytes, name: str = "people.csv") -> None:
    file: FilePayload = {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    page.locator("#import-file").set_input_files(file)


def imported(stack: Stack, domain: str) -> int:
    [(number,)] = stack.sql("SELECT count(*) FROM users WHERE email LIKE %s", f"%@{domain}")
    return int(number)


def test_columns_are_shown_and_changed_and_rejects_are_downloaded(
    stack: Stack, domain: str, open_console: Open, tmp_path: Path
) -> None:
    visit = open_console(f"{stack.edge}/#/import")
    page = visit.page
    choose(page, f"Wer,Vorname,Wohin\nLee,Ann,a@{domain}\nRoe,Bob,nonsense\nPoe,Cid,c@{domain}\n".encode())
    start = page.get_by_role("button", name="Import", exact=True)
    expect(start).to_be_disabled()
    page.get_by_label("Column for Name", exact=True).select_option("Vorname")
    page.get_by_label("Column for E-mail", exact=True).select_option("Wohin")
    page.get_by_role("button", name="Add a column for Name").click()
    page.get_by_label("Column for Name", exact=True).last.select_option("Wer")
    expect(page.get_by_role("cell", name="Ann Lee")).to_be_visible()
    expect(page.locator(".first-rows .bad")).to_have_count(1)
    assert imported(stack, domain) == 0
    assert serious_findings(page) == []
    start.click()
    expect(page.locator(".count-created dd")).to_have_text("2")
    expect(page.locator(".count-rejected dd")).to_have_text("1")
    expect(page.get_by_text("Line 3:")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the rejected rows").click()
    assert download.value.suggested_filename == "people.csv.rejects.ndjson"
    download.value.save_as(tmp_path / "rejects")
    [reject] = [json.loads(line) for line in (tmp_path / "rejects").read_text().splitlines()]
    assert (reject["line"], reject["row"]["email"]) == (3, "nonsense")
    assert imported(stack, domain) == 2
    assert visit.complaints == []
    assert visit.hosts == {stack.edge.removeprefix("http://")}


def test_packed_file_is_imported_in_pieces_with_progress(stack: Stack, domain: str, open_console: Open) -> None:
    page = open_console(f"{stack.edge}/#/import").page
    content = "name,email\n" + "".join(f"Person {n},p{n}@{domain}\n" for n in range(1500))
    choose(page, gzip.compress(content.encode()), "people.csv.gz")
    page.get_by_role("button", name="Import", exact=True).click()
    expect(page.locator(".count-created dd")).to_have_text("1,500", timeout=IMPORT_MS)
    expect(page.get_by_role("link", name="Go to the users")).to_be_visible()
    assert imported(stack, domain) == 1500


def test_import_survives_lost_answers_and_the_end_of_its_page(stack: Stack, domain: str, open_console: Open) -> None:
    visit = open_console(f"{stack.edge}/#/import")
    page = visit.page
    rows = "".join(f"Person {n},p{n}@{domain}\n" for n in range(2100))
    content = f"name,email\nNobody,nonsense\n{rows}".encode()
    sent: list[Any] = []

    def lose_second_answer(route: Route) -> None:
        sent.append(route.request)
        if len(sent) == 2:
            route.fetch()
            route.abort()
        elif len(sent) == 4:  # the page ends while the third piece is on its way
            route.fetch()
        else:
            route.continue_()

    page.route("**/console/import", lose_second_answer)
    choose(page, content)
    page.get_by_role("button", name="Import", exact=True).click()
    while len(sent) < 4:
        page.wait_for_timeout(50)  # lets Playwright call the function above
    page.unroute("**/console/import")
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    choose(page, content)
    expect(page.get_by_text("An import of this file was interrupted")).to_be_visible()
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".count-created dd")).to_have_text("2,100", timeout=IMPORT_MS)
    expect(page.locator(".count-rejected dd")).to_have_text("1")
    assert imported(stack, domain) == 2100
    assert page.evaluate("localStorage.getItem('import')") is None


def test_file_that_cannot_be_read_says_why(stack: Stack, open_console: Open) -> None:
    page = open_console(f"{stack.edge}/#/import").page
    choose(page, b"%PDF-1.7 nothing for a table", "people.pdf")
    expect(page.get_by_role("alert")).to_contain_text("The file is a PDF")
    page.get_by_role("button", name="Choose another file").click()
    choose(page, "name,email\nЖан,zhan@example.com\nЖук,b@example.com\n".encode("cp1251"))
    expect(page.get_by_role("alert")).to_contain_text("windows-1251")
    page.get_by_label("Encoding").select_option("windows-1251")
    expect(page.get_by_role("cell", name="Жан")).to_be_visible()


def test_file_that_is_given_up_while_it_is_unpacked_is_forgotten(stack: Stack, open_console: Open) -> None:
    page = open_console(f"{stack.edge}/#/import").page
    page.evaluate(
        """() => {
            const { blob } = Response.prototype;
            Response.prototype.blob = async function () {
                await new Promise((resolve) => { globalThis.unpack = resolve; });
                return blob.call(this);
            };
        }"""
    )
    choose(page, gzip.compress(b"name,email\nAnn,ann@example.com\n"), "first.csv.gz")
    page.get_by_role("button", name="Choose another file").click()
    choose(page, b"name,email\nBob,bob@example.com\n", "second.csv")
    page.evaluate("unpack()")
    expect(page.get_by_role("cell", name="bob@example.com")).to_be_visible()
    expect(page.get_by_role("heading", name="second.csv")).to_be_visible()
    expect(page.locator(".toast-message")).to_have_count(0)


@pytest.mark.parametrize("locale", ["en-GB", "ru-RU"])
def test_page_fits_a_phone_in_both_languages(stack: Stack, open_console: Open, locale: str) -> None:
    page = open_console(f"{stack.edge}/#/import", locale=locale, viewport={"width": 360, "height": 740}).page
    expect(page.locator(".drop-zone")).to_be_visible()
    assert serious_findings(page) == []
    choose(page, b"First Name,Last Name,E-mail 1 - Value,Labels\nAnn,Lee,ann.lee@example.com,x\n")
    expect(page.get_by_role("cell", name="Ann Lee")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert serious_findings(page) == []


def test_all_users_are_downloaded(stack: Stack, open_console: Open, tmp_path: Path) -> None:
    requests.get(f"{stack.edge}/users/1", timeout=5)
    page = open_console(f"{stack.edge}/#/import").page
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV for Excel").click()
    assert download.value.suggested_filename == "users.csv"
    download.value.save_as(tmp_path / "users.csv")
    text = (tmp_path / "users.csv").read_text()
    assert text.startswith("\ufeffid,name,email")
    [(rows,)] = stack.sql("SELECT count(*) FROM users")
    assert len(text.splitlines()) == rows + 1


def test_members_of_a_file_cannot_be_taken_for_words_of_the_page(stack: Stack, domain: str, open_console: Open) -> None:
    visit = open_console(f"{stack.edge}/#/import")
    page = visit.page
    rows = [
        {"name": "Ann", "email": f"a@{domain}"},
        {"name": "Bob", "email": f"b@{domain}", "constructor": 1, "line": 2},
    ]
    choose(page, "\n".join(map(json.dumps, rows)).encode(), "people.ndjson")
    expect(page.locator(".first-rows .bad")).to_contain_text("constructor")
    page.get_by_role("button", name="Import", exact=True).click()
    expect(page.locator(".count-rejected dd")).to_have_text("1")
    expect(page.locator(".rejects li")).to_contain_text("constructor")
    assert imported(stack, domain) == 1
    assert visit.complaints == []
