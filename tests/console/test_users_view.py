"""The view of all users in a real browser, on the real stack."""

import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import requests
from playwright.sync_api import Page, Route, expect

from testkit.browser import Visit, lose_responses, serious_findings
from testkit.stack import Stack, wait_until

Open = Callable[..., Visit]

HOSTILE = "<img src=x onerror=alert(1)>"

EXPECTED = re.compile(r"Failed to load resource: the server responded with a status of (404|409|412|422|504) ")
"""Refusals that a test provokes. Chromium complains about each."""

_numbers = count(1)


@pytest.fixture
def person(stack: Stack) -> Iterator[dict[str, Any]]:
    """A user whose name no other test uses; deleted afterwards."""
    number = next(_numbers)
    fields = {"name": f"Zenobia{number} Quill", "email": f"zenobia{number}@view.example"}
    created = requests.post(f"{stack.app}/users", json=fields, timeout=5)
    assert created.status_code == 201, created.text
    url = f"{stack.app}/users/{created.json()['id']}"
    yield {"id": created.json()["id"], "url": url, **fields}
    requests.delete(url, timeout=5)


@pytest.fixture
def visit(stack: Stack, open_console: Open) -> Iterator[Visit]:
    """The view, of which neither the browser nor the policy complains."""
    visit = open_console(stack.edge)
    expect(visit.page.get_by_role("table")).to_be_visible()
    yield visit
    assert [each for each in visit.complaints if not EXPECTED.search(each)] == []
    assert visit.hosts == {stack.edge.partition("//")[2]}


def find(page: Page, words: str) -> None:
    page.get_by_role("searchbox").fill(words)


def row_of(page: Page, person: dict[str, Any]) -> Any:
    return page.locator(f"tr[data-id='{person['id']}']")


def stored(person: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = requests.get(person["url"], timeout=5).json()
    return row


class TestReading:
    def test_search_finds_while_typing_and_drops_late_answers(self, visit: Visit, person: dict[str, Any]) -> None:
        page = visit.page
        late: list[Route] = []
        page.route(re.compile(r"users\?.*q=Zen(&|$)"), lambda route: late.append(route))
        find(page, "Zen")
        expect(page.locator(".users-area")).to_have_attribute("aria-busy", "true")
        page.wait_for_timeout(400)
        find(page, person["name"])
        expect(row_of(page, person)).to_be_visible()
        expect(page.locator("#count")).to_have_text("1 found")
        assert late
        expect(page.locator("tbody tr")).to_have_count(1)
        assert "Zenobia" not in page.url
        find(page, "nobody has this name")
        expect(page.get_by_text("No users found")).to_be_visible()
        page.get_by_role("button", name="Clear the search").click()
        expect(row_of(page, person)).to_be_visible()

    def test_order_and_search_survive_the_way_to_a_user_and_back(self, visit: Visit, person: dict[str, Any]) -> None:
        page = visit.page
        page.get_by_role("button", name="Name").click()
        expect(page.get_by_role("columnheader", name="Name")).to_have_attribute("aria-sort", "ascending")
        find(page, "Zenobia")
        expect(row_of(page, person)).to_be_visible()
        page.evaluate("location.hash = '#/nowhere'")
        expect(page.get_by_role("heading", name="There is no such page")).to_be_visible()
        page.go_back()
        expect(page.get_by_role("searchbox")).to_have_value("Zenobia")
        expect(row_of(page, person)).to_be_visible()
        expect(page.get_by_role("columnheader", name="Name")).to_have_attribute("aria-sort", "ascending")
        page.go_back()
        expect(page.get_by_role("searchbox")).to_have_value("")

    def test_pages_go_forward_and_back_and_a_link_leads_to_one(self, stack: Stack, open_console: Open) -> None:
        operations = [{"op": "create", "name": f"Paged {n}", "email": f"paged{n}@view.example"} for n in range(120)]
        results = requests.post(f"{stack.app}/users/batch", json={"operations": operations}, timeout=10).json()[
            "results"
        ]
        try:
            visit = open_console(stack.edge)
            page, table = visit.page, visit.page.locator("tbody")
            expect(table).to_contain_text("Paged 119")
            first = table.inner_text()
            page.get_by_role("button", name="Next page").click()
            expect(table).to_contain_text("Paged 69")
            expect(page.locator(".range")).to_contain_text("51–100 of")
            second, link = table.inner_text(), page.url
            page.get_by_role("button", name="Next page").click()
            expect(table).to_contain_text("Paged 19")
            page.get_by_role("button", name="Previous page").click()
            expect(table).to_contain_text("Paged 69")
            assert table.inner_text() == second
            page.go_back()
            expect(table).to_contain_text("Paged 19")
            page.go_back()
            page.go_back()
            expect(table).to_contain_text("Paged 119")
            assert table.inner_text() == first
            other = open_console(link).page
            expect(other.locator("tbody")).to_contain_text("Paged 69")
            expect(other.locator(".range")).to_contain_text("51–100 of")
        finally:
            ids = [{"op": "delete", "id": result["id"]} for result in results]
            requests.post(f"{stack.app}/users/batch", json={"operations": ids}, timeout=10)

    def test_badge_goes_from_postgresql_to_nginx(self, visit: Visit, person: dict[str, Any]) -> None:
        page = visit.page
        badge = page.locator(".read", has_text="Rows").locator(".tier")
        find(page, person["name"])
        expect(badge).to_contain_text(re.compile(r"PostgreSQL · [\d.]+ ms"))

        def is_hit() -> bool:
            page.get_by_role("button", name="Read again").click()
            expect(page.locator(".users-area")).to_have_attribute("aria-busy", "false")
            return re.match(r"Nginx · [\d.]+ ms", badge.inner_text()) is not None

        # An edge that has just been fenced, as on a loaded machine, stores nothing for a moment.
        wait_until(is_hit, every=0.2)


class TestWriting:
    def test_user_is_created_and_refusals_stand_at_their_fields(self, stack: Stack, visit: Visit) -> None:
        page = visit.page
        page.get_by_role("button", name="New user").click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_label("Name")).to_be_focused()
        page.keyboard.type(HOSTILE)
        page.keyboard.press("Tab")
        page.keyboard.type("no address")
        page.keyboard.press("Enter")
        expect(dialog.locator("#new-email-problem")).to_contain_text("E-mail: ")
        expect(dialog.get_by_label("E-mail")).to_be_focused()
        assert serious_findings(page) == []
        page.keyboard.press("Escape")
        page.get_by_role("button", name="New user").click()
        expect(dialog.get_by_label("Name")).to_have_value(HOSTILE)
        dialog.get_by_label("E-mail").fill("hostile@view.example")
        page.keyboard.press("Enter")
        expect(dialog).to_have_count(0)
        expect(page.get_by_role("button", name="New user")).to_be_focused()
        link = page.get_by_role("link", name=HOSTILE)
        expect(link).to_be_visible()
        assert page.locator("main img").count() == 0
        row_id = str(link.get_attribute("href")).rpartition("/")[2]
        assert requests.delete(f"{stack.app}/users/{row_id}", timeout=5).status_code == 200

    def test_user_is_edited_in_place_by_keyboard(self, visit: Visit, person: dict[str, Any]) -> None:
        page = visit.page
        find(page, person["name"])
        expect(row_of(page, person)).to_be_visible()
        page.locator(f"#edit-{person['id']}").focus()
        page.keyboard.press("Enter")
        expect(page.locator(f"#name-{person['id']}")).to_be_focused()
        page.keyboard.press("Control+A")
        page.keyboard.type("Renamed")
        page.keyboard.press("Enter")
        expect(row_of(page, person)).to_contain_text("Renamed")
        expect(page.locator(f"#edit-{person['id']}")).to_be_focused()
        assert stored(person)["name"] == "Renamed"

    def test_lost_race_shows_both_versions_and_a_choice(self, visit: Visit, person: dict[str, Any]) -> None:
        page = visit.page
        find(page, person["name"])
        page.get_by_role("button", name=f"Edit {person['name']}").click()
        page.locator(f"#name-{person['id']}").fill("Mine")
        requests.put(person["url"], json={"name": "Theirs"}, timeout=5)
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog", name="Changed meanwhile")
        expect(dialog).to_contain_text("Theirs")
        expect(dialog).to_contain_text("Mine")
        assert serious_findings(page) == []
        dialog.get_by_role("button", name="Go on editing").click()
        expect(page.locator(f"#name-{person['id']}")).to_have_value("Mine")
        requests.put(person["url"], json={"name": "Theirs again"}, timeout=5)
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("Theirs again")
        dialog.get_by_role("button", name="Save mine").click()
        expect(row_of(page, person)).to_contain_text("Mine")
        assert stored(person)["name"] == "Mine"

    def test_deleted_user_comes_back_also_after_a_reload(self, visit: Visit, person: dict[str, Any]) -> None:
        page = visit.page
        find(page, person["name"])
        for reloads in (False, True):
            page.get_by_role("button", name=f"Delete {person['name']}").click()
            expect(row_of(page, person)).to_have_count(0)
            assert requests.get(person["url"], timeout=5).status_code == 404
            if reloads:
                page.reload()
            page.get_by_role("button", name="Undo").click()
            expect(row_of(page, person)).to_be_visible()
            assert stored(person)["email"] == person["email"]
            page.locator(".toast-message").get_by_role("button", name="Close").first.click()

    def test_keyboard_keeps_its_place_when_a_row_is_deleted(
        self, stack: Stack, open_console: Open, person: dict[str, Any]
    ) -> None:
        page = open_console(stack.edge).page
        expect(page.locator("tbody tr").first).to_contain_text(person["name"])
        page.locator(f"#delete-{person['id']}").press("Enter")
        expect(row_of(page, person)).to_have_count(0)
        expect(page.locator("tbody tr").first.get_by_role("button").last).to_be_focused()
        page.get_by_role("button", name="Undo").press("Enter")
        expect(row_of(page, person)).to_be_visible()
        assert page.evaluate("document.activeElement !== document.body")

    def test_deletion_whose_answer_is_lost_is_unknown_and_can_be_undone(
        self, stack: Stack, open_console: Open, person: dict[str, Any]
    ) -> None:
        page = open_console(stack.edge).page
        find(page, person["name"])

        lose_responses(page, f"**/users/{person['id']}", "DELETE")
        page.get_by_role("button", name=f"Delete {person['name']}").click()
        message = page.locator(".toast-message")
        expect(message).to_contain_text(f"It is not known whether {person['name']} was deleted.")
        page.unroute_all()
        message.get_by_role("button", name="Try again").click()
        expect(message).to_contain_text(f"{person['name']} was deleted.")
        expect(row_of(page, person)).to_have_count(0)
        message.get_by_role("button", name="Undo").click()
        expect(row_of(page, person)).to_be_visible()
        assert stored(person)["email"] == person["email"]

    def test_chosen_rows_are_exported_and_deleted_together(
        self, stack: Stack, visit: Visit, person: dict[str, Any]
    ) -> None:
        page = visit.page
        ids = [
            requests.post(
                f"{stack.app}/users", json={"name": f"=Chosen, {n}", "email": f"chosen{n}@view.example"}, timeout=5
            ).json()["id"]
            for n in range(4)
        ]
        find(page, "chosen")
        expect(page.locator("tbody tr")).to_have_count(4)
        page.locator(f"#choose-{ids[3]}").check()
        page.locator(f"#choose-{ids[1]}").click(modifiers=["Shift"])
        expect(page.get_by_text("3 selected")).to_be_visible()
        page.keyboard.press("Shift+ArrowDown")
        expect(page.get_by_text("4 selected")).to_be_visible()
        with page.expect_download() as download:
            page.get_by_role("button", name="Export as CSV").click()
        content = download.value.path().read_bytes()
        assert content.startswith(b"\xef\xbb\xbf")  # as CSV for Excel
        lines = content.decode("utf-8-sig").splitlines()
        assert lines[0] == "id,name,email,created_at,updated_at,version"
        assert f'{ids[0]},"\'=Chosen, 0",chosen0@view.example' in lines[4]
        requests.delete(f"{stack.app}/users/{ids[0]}", timeout=5)
        answers = count()

        def lose_the_second(route: Route) -> None:
            response = route.fetch()  # the first one refuses the user that is gone
            if next(answers) == 1:
                route.fulfill(status=504, body="")
            else:
                route.fulfill(response=response)

        page.route("**/users/batch", lose_the_second)
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.locator(".toasts").get_by_text("3 users were deleted.")).to_be_visible()
        expect(page.locator(".toasts").get_by_text("1 user was already deleted.")).to_be_visible()
        expect(page.get_by_text("No users found")).to_be_visible()
        page.get_by_role("button", name="Undo").click()
        expect(page.locator("tbody tr")).to_have_count(3)
        for row_id in ids[1:]:
            assert requests.delete(f"{stack.app}/users/{row_id}", timeout=5).status_code == 200

    def test_search_is_exported_in_its_order_and_no_list_of_downloads_has_its_words(
        self, visit: Visit, person: dict[str, Any]
    ) -> None:
        page = visit.page
        find(page, person["name"])
        expect(page.locator("#count")).to_have_text("1 found")
        page.get_by_role("button", name="Export", exact=True).click()
        dialog = page.get_by_role("dialog", name="Export")
        expect(dialog.get_by_label("The 1 user that the search finds")).to_be_checked()
        assert serious_findings(page) == []
        with page.expect_download() as download:
            dialog.locator(".export-csv").click()
        assert download.value.url.startswith("blob:")
        assert download.value.suggested_filename == "users.csv"
        lines = download.value.path().read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["id", str(person["id"])]

        page.get_by_role("button", name="Export", exact=True).click()
        dialog.get_by_label("All users").check()
        with page.expect_download() as download:
            dialog.locator(".export-csv").click()
        assert download.value.url.endswith("/users.csv?sort=-id")
        ids = [int(line.split(",")[0]) for line in download.value.path().read_text().splitlines()[1:]]
        assert ids == sorted(ids, reverse=True)
        assert len(ids) > 1


class TestTrouble:
    def test_service_away_loses_nothing_and_can_be_tried_again(
        self, stack: Stack, open_console: Open, person: dict[str, Any]
    ) -> None:
        visit = open_console(stack.edge)
        page = visit.page
        expect(row_of(page, person)).to_be_visible()
        page.get_by_role("button", name=f"Edit {person['name']}").click()
        page.locator(f"#name-{person['id']}").fill("Kept")
        page.context.set_offline(True)
        page.keyboard.press("Enter")
        expect(page.locator("tr.editing")).to_contain_text("Nothing that you entered is lost.")
        page.get_by_role("button", name="Read again").click()
        expect(page.locator(".notice")).to_contain_text("The service does not answer.")
        expect(page.locator(f"#name-{person['id']}")).to_have_value("Kept")
        page.context.set_offline(False)
        page.locator(".notice").get_by_role("button", name="Try again").click()
        expect(page.locator(".notice")).to_be_hidden()
        page.locator(f"#save-{person['id']}").click()
        expect(row_of(page, person)).to_contain_text("Kept")
        assert stored(person)["name"] == "Kept"

    def test_slow_service_is_announced_and_failing_one_explained(
        self, stack: Stack, open_console: Open, person: dict[str, Any]
    ) -> None:
        visit = open_console(f"{stack.edge}/#/nowhere")
        page = visit.page
        held: list[Route] = []
        page.route(re.compile(r"/users\?"), lambda route: held.append(route))
        page.get_by_role("link", name="Users", exact=True).click()
        expect(page.locator("main").get_by_text("Loading")).to_be_visible()
        expect(page.locator(".notice")).to_contain_text("The service is slow.")
        assert serious_findings(page) == []
        held.pop().abort()
        expect(page.get_by_text("That did not work")).to_be_visible()
        assert serious_findings(page) == []
        page.unroute_all()
        page.get_by_role("button", name="Try again").click()
        expect(row_of(page, person)).to_be_visible()

    def test_action_whose_module_is_not_there_waits_and_can_be_tried_again(
        self, stack: Stack, open_console: Open, person: dict[str, Any]
    ) -> None:
        page = open_console("about:blank").page
        module = re.compile("/user_writes.js")
        page.route(module, lambda route: route.abort())
        page.goto(stack.edge)
        page.get_by_role("button", name=f"Delete {person['name']}").click()
        notice = page.locator(".notice")
        expect(notice).to_contain_text("a part of the page that could not be loaded")
        assert stored(person)["email"] == person["email"]
        page.unroute(module)
        notice.get_by_role("button", name="Try again").click()
        expect(page.locator(".toast-message")).to_contain_text(f"{person['name']} was deleted.")
        expect(notice).to_be_hidden()


def test_reasons_of_the_api_are_shown_in_the_language_of_the_page(
    stack: Stack, open_console: Open, person: dict[str, Any]
) -> None:
    page = open_console(stack.edge, locale="ru-RU").page
    page.locator(f"#edit-{person['id']}").click()
    page.locator(f"#name-{person['id']}").fill("")
    page.keyboard.press("Enter")
    expect(page.locator("tr.editing")).to_contain_text("Имя: нужно от 1 до 100 символов, здесь 0")
    good = {"name": "Ann", "email": "ann@view.example"}
    names: list[Any] = ["", "\u200b", "a\u0001", "a" * 101, 7]
    emails = ["", "nonsense", f"{'a' * 250}@b.example", person["email"], "аnn@view.example"]
    bodies = [{}, *({**good, "name": name} for name in names), *({**good, "email": email} for email in emails)]
    states = page.evaluate("document.querySelector('script[type=module]').src").replace("console.js", "states.js")
    for body in [*bodies, {**good, "age": 7}]:
        response = requests.post(f"{stack.edge}/users", json=body, timeout=5)
        assert response.status_code in (409, 422), body
        for error in response.json()["errors"]:
            shown = page.evaluate(f"detail => import('{states}').then(m => m.reason(detail))", error["detail"])
            assert re.search("[а-я]", shown), error


@pytest.mark.parametrize(
    "options", [{"color_scheme": "dark"}, {"locale": "ru-RU", "viewport": {"width": 360, "height": 740}}]
)
def test_view_is_accessible_and_fits(
    stack: Stack, open_console: Open, person: dict[str, Any], options: dict[str, Any]
) -> None:
    page = open_console(stack.edge, **options).page
    expect(row_of(page, person)).to_be_visible()
    page.locator(f"#choose-{person['id']}").check()
    page.locator(f"#edit-{person['id']}").click()
    expect(page.locator("tr.editing")).to_be_visible()
    assert serious_findings(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    sections = page.get_by_role("navigation").first
    assert sections.evaluate("it => it.scrollWidth <= it.clientWidth"), "a section is cut off"
