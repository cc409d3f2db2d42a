"""The page of one user: its fields, what each tier holds for it, purges, and its history."""

import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import requests
from playwright.sync_api import Page, expect

from testkit.browser import Visit, lose_responses, serious_findings
from testkit.stack import Stack

Open = Callable[..., Visit]

_numbers = count(1)


@pytest.fixture
def user(stack: Stack) -> Iterator[dict[str, Any]]:
    number = next(_numbers)
    row = {"name": f"Page {number}", "email": f"page{number}@example.com"}
    row_id = requests.post(f"{stack.edge}/users", json=row, timeout=5).json()["id"]
    yield {**row, "id": row_id}
    requests.delete(f"{stack.edge}/users/{row_id}", timeout=5)


def open_user(open_console: Open, stack: Stack, user: dict[str, Any], **options: Any) -> Visit:
    visit = open_console(f"{stack.edge}/#/users/{user['id']}", **options)
    expect(visit.page.get_by_role("heading", level=1)).to_have_text(user["name"])
    return visit


def stage(page: Page, tier: str) -> Any:
    return page.locator(f".stage-{tier} .tier-state").first


def last_read(page: Page) -> Any:
    return page.locator(".tier-reads li").last


def test_repeated_reads_come_from_postgresql_then_redis_then_nginx(
    stack: Stack, user: dict[str, Any], open_console: Open
) -> None:
    visit = open_user(open_console, stack, user)
    page = visit.page
    expect(stage(page, "postgres")).to_have_text("The row itself")
    page.get_by_role("button", name="Purge", exact=True).click()
    expect(last_read(page)).to_have_text("purged")
    expect(stage(page, "redis")).to_have_text("Nothing")
    expect(page.locator(".stage-nginx.holds")).to_have_count(0)

    read = page.get_by_role("button", name="Read", exact=True)
    read.click()
    expect(last_read(page)).to_contain_text("PostgreSQL")
    expect(stage(page, "redis")).to_contain_text("bytes")
    page.get_by_role("button", name="Purge Nginx only").click()
    expect(last_read(page)).to_have_text("purged")
    read.click()
    expect(last_read(page)).to_contain_text("Redis")
    expect(page.locator(".stage-nginx.holds")).to_have_count(1)  # the edge that the page is from
    read.click()
    expect(last_read(page)).to_contain_text("Nginx")
    expect(page.locator(".user-source")).to_contain_text("Nginx")
    assert visit.complaints == []
    assert visit.hosts == {stack.edge.removeprefix("http://")}


def test_change_is_saved_and_a_refused_change_stays_in_its_field(
    stack: Stack, user: dict[str, Any], open_console: Open
) -> None:
    page = open_user(open_console, stack, user).page
    save = page.get_by_role("button", name="Save")
    expect(save).to_be_disabled()
    page.get_by_label("E-mail").fill("nonsense")
    save.click()
    expect(page.get_by_label("E-mail")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("E-mail")).to_be_focused()
    page.get_by_label("E-mail").fill(user["email"])
    page.get_by_label("Name").fill("<img src=x onerror=alert(1)>")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("<img src=x onerror=alert(1)>")
    assert requests.get(f"{stack.edge}/users/{user['id']}", timeout=5).json()["version"] == 2


def test_what_was_typed_stays_when_the_user_is_read_again_and_when_the_view_is_left(
    stack: Stack, user: dict[str, Any], open_console: Open
) -> None:
    page = open_user(open_console, stack, user).page
    assert user["name"] not in page.title()
    page.get_by_label("Name").fill("Typed")
    requests.patch(f"{stack.edge}/users/{user['id']}", json={"email": f"new.{user['email']}"}, timeout=5)
    page.evaluate("dispatchEvent(new Event('userschange'))")
    expect(page.locator(".history-item")).to_have_count(2)
    expect(page.get_by_label("Name")).to_have_value("Typed")
    page.get_by_role("link", name="All users").click()
    expect(page.get_by_role("searchbox")).to_be_visible()
    page.go_back()
    expect(page.get_by_label("Name")).to_have_value("Typed")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("dialog")).to_contain_text(f"new.{user['email']}")  # it has changed since it was seen
    page.get_by_role("button", name="Go on editing").click()
    page.get_by_role("button", name="Discard").click()
    expect(page.get_by_label("Name")).to_have_value(user["name"])
    expect(page.get_by_label("E-mail")).to_have_value(f"new.{user['email']}")


def test_save_whose_answer_is_lost_is_recognised(stack: Stack, user: dict[str, Any], open_console: Open) -> None:
    page = open_user(open_console, stack, user).page

    lose_responses(page, f"**/users/{user['id']}", "PATCH")
    page.get_by_label("Name").fill("Renamed")
    page.keyboard.press("Enter")
    expect(page.locator(".form-problem")).to_contain_text("The service does not answer.")
    page.unroute_all()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Renamed")
    assert requests.get(f"{stack.edge}/users/{user['id']}", timeout=5).json()["version"] == 2


def test_lost_race_shows_both_versions(stack: Stack, user: dict[str, Any], open_console: Open) -> None:
    page = open_user(open_console, stack, user).page
    page.get_by_label("Name").fill("Mine")
    requests.put(f"{stack.edge}/users/{user['id']}", json={"name": "Theirs"}, timeout=5)
    page.get_by_role("button", name="Save").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Mine")
    expect(dialog).to_contain_text("Theirs")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Mine")


@pytest.mark.parametrize(
    "options",
    [
        {"color_scheme": "dark"},
        {"viewport": {"width": 360, "height": 740}, "locale": "ru-RU"},
    ],
)
def test_page_is_accessible_and_fits_a_phone(
    stack: Stack, user: dict[str, Any], open_console: Open, options: dict[str, Any]
) -> None:
    page = open_user(open_console, stack, user, **options).page
    expect(page.locator(".stage")).to_have_count(4)
    assert serious_findings(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not re.search(r"\bundefined\b|\bnull\b", page.locator("main").inner_text())


def test_user_that_does_not_exist_says_so(stack: Stack, open_console: Open) -> None:
    page = open_console(f"{stack.edge}/#/users/999999999").page
    expect(page.get_by_text("There is no such user")).to_be_visible()
    expect(page.locator(".stage")).to_have_count(4)


def test_tiers_that_cannot_be_shown_say_why(stack: Stack, user: dict[str, Any], open_console: Open) -> None:
    page = open_user(open_console, stack, user).page
    page.route("**/console/purge", lambda route: route.abort())
    page.get_by_role("button", name="Purge", exact=True).click()
    expect(page.locator(".tiers-problem")).to_contain_text("The service does not answer")
    page.unroute_all()
    page.route("**/console/purge", lambda route: route.fulfill(status=403, body="<h1>No</h1>"))
    page.get_by_role("button", name="Purge", exact=True).click()
    expect(page.locator(".tiers-problem")).not_to_contain_text("API key")  # a proxy has refused it
    page.route("**/console/tiers*", lambda route: route.fulfill(status=401, body=""))
    page.get_by_role("button", name="Read", exact=True).click()
    expect(page.locator(".tiers-problem")).to_contain_text("This needs a valid API key.")
    expect(page.get_by_role("dialog")).to_have_count(0)  # the rest of the page needs no key


def test_old_version_is_restored_and_a_deleted_user_brought_back(
    stack: Stack, user: dict[str, Any], open_console: Open
) -> None:
    address = f"{stack.edge}/users/{user['id']}"
    requests.patch(address, json={"name": "Second"}, timeout=5)
    page = open_user(open_console, stack, {**user, "name": "Second"}).page
    items = page.locator(".history-item")
    expect(items).to_have_count(2)
    expect(items.first.locator("del")).to_have_text(user["name"])
    expect(items.first.locator("ins")).to_have_text("Second")
    page.get_by_role("button", name="Restore version 1").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(user["name"])
    expect(items).to_have_count(3)

    requests.patch(address, json={"name": "Fourth"}, timeout=5)
    page.get_by_role("button", name="Restore version 2").click()
    expect(page.locator(".toast-text").last).to_contain_text("The user was changed meanwhile")
    expect(page.get_by_role("heading", level=1)).to_have_text("Fourth")

    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_text("There is no such user")).to_be_visible()
    expect(stage(page, "postgres")).to_have_text("No row")
    page.get_by_role("button", name="Restore version 4").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Fourth")
    assert requests.get(address, timeout=5).json()["version"] == 6


def test_long_history_is_read_a_page_at_a_time(stack: Stack, user: dict[str, Any], open_console: Open) -> None:
    for number in range(25):
        requests.patch(f"{stack.edge}/users/{user['id']}", json={"name": f"Name {number}"}, timeout=5)
    page = open_user(open_console, stack, {**user, "name": "Name 24"}).page
    expect(page.locator(".history-item")).to_have_count(20)
    page.get_by_role("button", name="Older versions").click()
    expect(page.locator(".history-item")).to_have_count(26)
    expect(page.get_by_role("button", name="Older versions")).to_have_count(0)
