"""The page at `/` and its files, on a stack where every request for data needs a key."""

import gzip
import json
import re
from collections.abc import Callable, Iterator

import pytest
import requests
from playwright.sync_api import Route, expect

from testkit.api import check_problem
from testkit.browser import Visit, serious_findings
from testkit.stack import ROOT, Stack, run, running

MAX_COMPRESSED_BYTES = 200_000

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}

STATIC = ROOT / "velikiy/console/static"

QUIET_MS = 500
"""A browser that has requested nothing for so long waits for a response."""

TELL_WHEN_ROWS_ARE_SHOWN = """
new MutationObserver((_, observer) => {
    if (document.querySelector("tbody tr")) {
        observer.disconnect();
        rowsAreShown();
    }
}).observe(document, { childList: true, subtree: true });
"""

Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def keyed() -> Iterator[Stack]:
    with running("--apps", "1", AUTH="all") as stack:
        yield stack


def new_key(stack: Stack, name: str, scope: str) -> str:
    completed = run("velikiy", "--data", str(stack.data), "keys", "create", name, "--scope", scope)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


@pytest.fixture(scope="module")
def writer(keyed: Stack) -> str:
    return new_key(keyed, "writer", "write")


@pytest.fixture(scope="module")
def reader(keyed: Stack) -> str:
    return new_key(keyed, "reader", "read")


def files(stack: Stack) -> list[str]:
    page = requests.get(f"{stack.edge}/", headers=BROWSER, timeout=5).text
    return ["/" + address for address in re.findall('(?:src|href)="(console/[^"]+)"', page)]


class TestAddresses:
    def test_browsers_get_the_page_and_programs_an_index(self, keyed: Stack) -> None:
        page = requests.get(f"{keyed.edge}/", headers=BROWSER, timeout=5)
        assert page.status_code == 200
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        for accept in ("*/*", "application/json", "application/json, text/html", "application/*"):
            index = requests.get(f"{keyed.edge}/", headers={"Accept": accept}, timeout=5)
            assert index.headers["Content-Type"] == "application/json"
            assert index.json()["addresses"]["users"] == "/users"
            assert index.headers["Vary"] == "Accept"
        check_problem(requests.get(f"{keyed.edge}/", headers={"Accept": "image/png"}, timeout=5), 406)
        check_problem(requests.get(f"{keyed.edge}/?q=1", timeout=5), 400)

    def test_head_has_the_headers_of_get(self, keyed: Stack) -> None:
        for path in ["/", *files(keyed)[:3]]:
            headers = {**BROWSER, "Accept-Encoding": "identity"}
            head, get = (
                requests.request(verb, keyed.edge + path, headers=headers, timeout=5) for verb in ("HEAD", "GET")
            )
            for name in ("Content-Type", "Content-Length", "Cache-Control", "Content-Security-Policy"):
                assert head.headers[name] == get.headers[name]
            assert head.content == b""

    def test_page_allows_only_its_own_files(self, keyed: Stack) -> None:
        page = requests.get(f"{keyed.edge}/", headers=BROWSER, timeout=5)
        policy = page.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert page.headers["Referrer-Policy"] == "no-referrer"
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert page.headers["Cache-Control"] == "private, no-cache"
        assert not re.search("<style|style=|<script(?![^>]*src=)| on[a-z]+=", page.text)

    def test_files_are_cached_for_ever_and_small_together(self, keyed: Stack) -> None:
        size = 0
        for path in files(keyed):
            response = requests.get(keyed.edge + path, timeout=5)
            assert response.status_code == 200, path
            assert response.headers["Cache-Control"] == "public, max-age=31536000, immutable"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}[path.rpartition(".")[2]]
            assert response.headers["Content-Type"].startswith(kind)
            assert len(response.content) < 2048 or response.headers["Content-Encoding"] == "gzip"
            size += min(len(gzip.compress(response.content, 1)), len(response.content))
        assert size < MAX_COMPRESSED_BYTES

    def test_file_of_another_version_is_not_kept(self, keyed: Stack) -> None:
        """A page that was opened before an upgrade finds the views that it has not loaded yet."""
        response = requests.get(f"{keyed.edge}/console/000000000000/users.js", timeout=5)
        assert response.status_code == 200
        assert response.headers["Cache-Control"] == "no-store"

    @pytest.mark.parametrize(
        "path", ["no.js", "page.py", "..%2Fpage.py", "../page.py", "texts", "bootstrap.min.css.map"]
    )
    def test_other_file_names_are_not_found(self, keyed: Stack, path: str) -> None:
        folder = files(keyed)[0].rpartition("/")[0]
        request = requests.Request("GET", f"{keyed.edge}/").prepare()
        request.url = f"{keyed.edge}{folder}/{path}"
        check_problem(requests.Session().send(request, timeout=5), 404)

    def test_post_is_refused(self, keyed: Stack) -> None:
        check_problem(requests.post(f"{keyed.edge}/", timeout=5), 405)

    def test_each_module_is_preloaded_that_the_first_rows_need(self) -> None:
        found, todo = set[str](), ["users.js", "console.js"]
        while todo:
            module = todo.pop()
            if module not in found:
                found.add(module)
                folder = module.rpartition("/")[0]
                names = re.findall('^import .*? from "\\./(.*?)";', (STATIC / module).read_text(), re.MULTILINE)
                todo += [f"{folder}/{name}".lstrip("/") for name in names]
        from velikiy.console.page import PRELOADED

        assert {*PRELOADED, "console"} == {module.removesuffix(".js") for module in found}


class TestLoad:
    """How soon the page can be used, in measures that do not depend on the load of the machine."""

    MAX_ROUND_TRIPS = 3
    """The document; its files and the first reads need the document, or one more file that starts the reads."""

    MAX_REQUESTS = 17

    def test_rows_need_three_round_trips_and_each_address_once(
        self, keyed: Stack, reader: str, open_with_key: Open
    ) -> None:
        """The responses are held until the browser requests nothing more without them: that is one round trip."""
        page = open_with_key("about:blank", reader).page
        held: list[Route] = []
        requested: list[str] = []
        shown: list[int] = []

        def hold(route: Route) -> None:
            held.append(route)
            requested.append(route.request.url)

        page.expose_function("rowsAreShown", lambda: shown.append(len(requested)))
        page.add_init_script(TELL_WHEN_ROWS_ARE_SHOWN)
        page.route("**/*", hold)
        page.evaluate(f"setTimeout(() => {{ location.href = '{keyed.edge}/' }})")
        round_trips = 0
        while not shown and round_trips < 10:
            number = -1
            while number != len(held):
                number = len(held)
                page.wait_for_timeout(QUIET_MS)
            if not all(route.request.url.endswith("icon.svg") for route in held):  # no row waits for a picture
                round_trips += 1
            while held:
                held.pop().continue_()
            page.wait_for_timeout(QUIET_MS)
        assert round_trips <= self.MAX_ROUND_TRIPS, requested
        addresses = [address for address in requested[: shown[0]] if not address.endswith("icon.svg")]
        assert len(addresses) == len(set(addresses))
        assert len(addresses) <= self.MAX_REQUESTS

    def test_first_reads_are_not_shown_again(self, keyed: Stack, reader: str, open_with_key: Open) -> None:
        """A read that is older than the view would be stale."""
        page = open_with_key(keyed.edge, reader).page
        expect(page.get_by_role("link", name="Alice")).to_be_visible()
        keyed.sql("UPDATE users SET name = 'Alicia' WHERE name = 'Alice'")
        try:
            page.evaluate("location.hash = '#/nowhere'")
            page.evaluate("location.hash = '#/users'")
            expect(page.get_by_role("link", name="Alicia")).to_be_visible()
            assert page.evaluate("firstReads.size") == 0
        finally:
            keyed.sql("UPDATE users SET name = 'Alice' WHERE name = 'Alicia'")


class TestKeys:
    def test_page_may_do_what_its_key_may(self, keyed: Stack, writer: str, reader: str) -> None:
        def rights(key: str) -> requests.Response:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return requests.get(f"{keyed.edge}/console/key", headers=headers, timeout=5)

        assert rights("").json() == {"auth": "all", "may_read": False, "may_write": False, "key": None}
        answer = rights(reader)
        assert answer.json() == {
            "auth": "all",
            "may_read": True,
            "may_write": False,
            "key": {"name": "reader", "scope": "read", "expires_at": None},
        }
        assert answer.headers["Cache-Control"] == "no-store"
        assert rights(writer).json()["may_write"] is True
        check_problem(rights("not-a-key"), 401)

    def test_other_data_of_the_console_needs_a_key(self, keyed: Stack, reader: str) -> None:
        check_problem(requests.get(f"{keyed.edge}/console/none", timeout=5), 401)
        headers = {"Authorization": f"Bearer {reader}"}
        check_problem(requests.get(f"{keyed.edge}/console/none", headers=headers, timeout=5), 404)

    def test_page_asks_for_a_key_and_shows_what_it_may_do(
        self, keyed: Stack, writer: str, reader: str, open_console: Open
    ) -> None:
        visit = open_console(keyed.edge)
        page = visit.page
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
        assert serious_findings(page) == []
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(dialog.get_by_text("This key is not valid")).to_be_visible()
        dialog.get_by_label("Key", exact=True).fill(reader)
        page.keyboard.press("Enter")
        expect(dialog).to_have_count(0)
        expect(page.get_by_role("link", name="Alice")).to_be_visible()
        expect(page.locator("#key-button")).to_contain_text("readerread only")
        expect(page.get_by_role("button", name="New user")).to_be_disabled()
        expect(page.get_by_role("button", name="Edit Alice")).to_be_disabled()
        page.locator("#key-button").click()
        dialog.get_by_label("Key", exact=True).fill(writer)
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="New user")).to_be_enabled()

        page.reload()
        expect(page.get_by_role("link", name="Alice")).to_be_visible()
        assert page.evaluate("JSON.stringify(localStorage)") == "{}"
        assert writer not in " ".join(visit.requested) + page.url
        page.locator("#key-button").click()
        page.get_by_role("button", name="Forget the key").click()
        expect(page.locator("#key-button")).to_contain_text("Enter an API key")
        assert page.evaluate("JSON.stringify(sessionStorage)") == "{}"
        refused = "Failed to load resource: the server responded with a status of 401 "
        assert [each for each in visit.complaints if refused not in each] == []

    def test_dismissed_question_leaves_a_way_to_answer_it(self, keyed: Stack, open_console: Open) -> None:
        page = open_console(keyed.edge).page
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_text("This needs a valid API key.")).to_be_visible()
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("dialog")).to_be_visible()


class TestShell:
    def test_language_follows_the_browser_and_can_be_switched(self, keyed: Stack, open_console: Open) -> None:
        page = open_console(f"{keyed.edge}/#/nowhere", locale="ru-RU").page
        expect(page.get_by_role("heading", name="Такой страницы нет")).to_be_visible()
        assert page.locator("html").get_attribute("lang") == "ru"
        page.get_by_label("Язык").select_option("en")
        expect(page.get_by_role("heading", name="There is no such page")).to_be_visible()
        page.reload()
        expect(page.get_by_role("heading", name="There is no such page")).to_be_visible()
        assert page.locator("html").get_attribute("lang") == "en"

    def test_theme_follows_the_system_and_can_be_switched(self, keyed: Stack, open_console: Open) -> None:
        page = open_console(f"{keyed.edge}/#/nowhere", color_scheme="dark").page
        html = page.locator("html")
        expect(html).to_have_attribute("data-bs-theme", "dark")
        page.emulate_media(color_scheme="light")
        expect(html).to_have_attribute("data-bs-theme", "light")
        page.get_by_role("button", name="Theme: as the system").click()
        page.emulate_media(color_scheme="dark")
        expect(html).to_have_attribute("data-bs-theme", "light")
        page.get_by_role("button", name="Theme: light").click()
        expect(html).to_have_attribute("data-bs-theme", "dark")
        page.emulate_media(media="print")
        expect(html).to_have_attribute("data-bs-theme", "light")
        expect(page.get_by_role("navigation")).to_be_hidden()

    def test_name_cannot_turn_the_direction_of_a_sentence(self, keyed: Stack, open_console: Open) -> None:
        page = open_console(f"{keyed.edge}/#/nowhere").page
        module = keyed.edge + files(keyed)[0].rpartition("/")[0] + "/texts.js"
        script = "name => import('%s').then(m => m.translator({ en: { gone: '{name} is gone' } })('gone', { name }))"
        assert page.evaluate(script % module, "Ann") == "Ann is gone"
        for name in ("Ann\u202e", "\u0645\u062d\u0645\u062f"):
            assert page.evaluate(script % module, name) == f"\u2068{name}\u2069 is gone"

    def test_keyboard_skips_to_the_content_and_follows_the_route(self, keyed: Stack, open_console: Open) -> None:
        page = open_console(f"{keyed.edge}/#/nowhere").page
        expect(page.get_by_role("heading", name="There is no such page")).to_be_visible()
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_be_focused()
        assert page.url.endswith("#/nowhere")

    def test_both_languages_have_the_same_texts(self, keyed: Stack, open_console: Open) -> None:
        page = open_console(f"{keyed.edge}/#/nowhere").page
        folder = keyed.edge + files(keyed)[0].rpartition("/")[0]
        modules = sorted(file.stem for file in (STATIC / "texts").glob("*.js"))
        for module in modules:
            texts = json.loads(
                page.evaluate(f"import('{folder}/texts/{module}.js').then(m => JSON.stringify(m.texts))")
            )
            assert set(texts) == {"en", "ru"}
            assert list(texts["en"]) == list(texts["ru"]), module
            for key, text in texts["en"].items():
                names = [set(re.findall(r"\{(\w+)\}", json.dumps(each))) for each in (text, texts["ru"][key])]
                assert names[0] == names[1], (module, key)
            used = (STATIC / f"{module}.js").read_text() if (STATIC / f"{module}.js").exists() else ""
            missing = set(re.findall(r'\bt\("(\w+)"', used)) - set(texts["en"])
            assert missing == set(), module
