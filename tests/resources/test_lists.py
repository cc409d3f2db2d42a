"""Pages, orders and searches of lists: each row appears once and in order, and every list shows each write at once."""

import unicodedata
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from itertools import count
from typing import Any
from urllib.parse import quote

import pytest
import requests

from testkit.api import is_hit
from testkit.failpoints import READER_FAILPOINTS, FailpointApp, failpoint_app, has_cache_lease
from testkit.raw_http import check_raw_problem, send_request
from testkit.stack import Stack, wait_until
from velikiy.resources import pagination
from velikiy.resources.pagination import Page

NAMES = [
    *("Anna", "anna", "ÄNNA", "Ännä", "Bob", "bob", "Çelik", "Zoë", "zoe", "Ирина", "ирина", "Йорк", "Ёлка", "Елка"),
    *("李明", "🙂 Smile", "_under", "100%", "O'Brien", "Same", "Same", "Same", "Same"),
]
SORTS = ["id", "-id", "name", "-name", "email", "-email", "created_at", "-created_at"]
SORT_EXPRESSIONS = {
    "id": "id",
    "name": 'name COLLATE "und-x-icu"',
    "email": "folded(email)",
    "created_at": "created_at",
}


def run_batch(base_url: str, *operations: dict[str, Any]) -> list[dict[str, Any]]:
    response = requests.post(f"{base_url}/users/batch", json={"operations": operations}, timeout=10)
    assert response.status_code == 200, response.text
    results: list[dict[str, Any]] = response.json()["results"]
    return results


def create(base_url: str, name: str, email: str) -> int:
    response = requests.post(f"{base_url}/users", json={"name": name, "email": email}, timeout=5)
    assert response.status_code == 201, response.text
    return int(response.json()["id"])


@pytest.fixture(scope="module")
def people(stack: Stack) -> Iterator[list[int]]:
    """Ids of users, of which several have the same name and most the same time. Each name contains the word Keyset."""
    created = run_batch(
        stack.app,
        *(
            {"op": "create", "name": f"{name} Keyset", "email": f"{'kK'[n % 2]}eyset{n * 7 % 23}@example.com"}
            for n, name in enumerate(NAMES)
        ),
    )
    ids = [result["id"] for result in created]
    stack.sql("UPDATE users SET created_at = created_at - interval '1 hour' WHERE id = ANY(%s)", ids[::3])
    stack.redis().flushdb()
    wait_until(lambda: all(ids[0] in found(edge, "Keyset", "-created_at") for edge in stack.edges))
    yield ids
    delete_all(stack.app, ids)


def delete_all(base_url: str, ids: list[int]) -> None:
    run_batch(base_url, *({"op": "delete", "id": user_id} for user_id in ids))


def read_pages(base_url: str, query: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Read all pages; return the ids in order, and the links of each page."""
    ids, links = [], []
    target = f"/users?{query}"
    while target:
        response = requests.get(base_url + target, timeout=5)
        assert response.status_code == 200, response.text
        ids += [row["id"] for row in response.json()]
        links.append(response.links)
        target = response.links.get("next", {}).get("url", "")
    return ids, links


def found(base_url: str, q: str, sort: str = "id") -> list[int]:
    response = requests.get(f"{base_url}/users", params={"q": q, "sort": sort}, timeout=5)
    assert response.status_code == 200, response.text
    return [row["id"] for row in response.json()]


def counted(base_url: str, q: str | None = None) -> int:
    return int(requests.get(f"{base_url}/users/count", params={"q": q} if q else {}, timeout=5).json()["count"])


def order_by(sort: str) -> str:
    expression, direction = SORT_EXPRESSIONS[sort.removeprefix("-")], "DESC" if sort.startswith("-") else "ASC"
    return f"ORDER BY {expression} {direction}, id {direction}"


class TestPages:
    @pytest.mark.parametrize("sort", SORTS)
    @pytest.mark.parametrize("limit", [1, 3, 1000])
    def test_pages_of_a_search_contain_each_match_once_and_in_order(
        self, stack: Stack, base_url: str, people: list[int], sort: str, limit: int
    ) -> None:
        rows = stack.sql(f"SELECT id FROM users WHERE id = ANY(%s) {order_by(sort)}", people)
        ids, _ = read_pages(base_url, f"limit={limit}&q=keyset&sort={sort}")
        assert ids == [row[0] for row in rows]

    @pytest.mark.parametrize("sort", SORTS)
    def test_pages_of_a_list_contain_each_row_once_and_in_order(
        self, stack: Stack, base_url: str, people: list[int], sort: str
    ) -> None:
        ids, _ = read_pages(base_url, f"limit=7&sort={sort}")
        assert ids == [row[0] for row in stack.sql(f"SELECT id FROM users {order_by(sort)}")]
        assert set(people) <= set(ids)

    def test_names_sort_by_the_rules_of_their_language_and_not_by_code_points(
        self, base_url: str, people: list[int]
    ) -> None:
        rows = requests.get(f"{base_url}/users?q=keyset&sort=name", timeout=5).json()
        names = [row["name"].removesuffix(" Keyset") for row in rows]
        assert names.index("anna") < names.index("Bob") < names.index("Çelik") < names.index("Zoë")
        assert names.index("Елка") < names.index("Ирина") < names.index("Йорк")

    def test_links_of_a_page_keep_its_parameters(self, base_url: str, people: list[int]) -> None:
        _, links = read_pages(base_url, "limit=10&q=Keyset&sort=-name")
        assert [sorted(page) for page in links] == [["first", "next"], ["first", "next"], ["first"]]
        assert {page["first"]["url"] for page in links} == {"/users?limit=10&q=Keyset&sort=-name"}
        assert read_pages(base_url, "q=keyset")[1] == [{}]

    def test_last_page_that_is_just_full_has_no_next_link(self, base_url: str, people: list[int]) -> None:
        _, links = read_pages(base_url, f"limit={len(people)}&q=keyset")
        assert links == [{}]

    def test_rows_created_and_deleted_between_two_pages_neither_repeat_nor_hide_other_rows(
        self, stack: Stack, base_url: str, people: list[int]
    ) -> None:
        first = requests.get(f"{base_url}/users?limit=5&q=keyset&sort=name", timeout=5)
        seen = [row["id"] for row in first.json()]
        before = create(base_url, "!Before Keyset", "before@example.com")
        gone = create(base_url, "Zzz Keyset", "gone@example.com")
        try:
            requests.delete(f"{base_url}/users/{gone}", timeout=5)
            rest, _ = read_pages(base_url, first.links["next"]["url"].partition("?")[2])
        finally:
            requests.delete(f"{base_url}/users/{before}", timeout=5)
        assert sorted(seen + rest) == sorted(people)

    def test_cursor_works_after_its_row_is_deleted(self, base_url: str, people: list[int]) -> None:
        last = create(base_url, "Last Keyset", "gone@example.com")
        first = requests.get(f"{base_url}/users?limit=1&q=keyset&sort=-id", timeout=5)
        ids = [row["id"] for row in first.json()]
        requests.delete(f"{base_url}/users/{last}", timeout=5)
        rest, _ = read_pages(base_url, first.links["next"]["url"].partition("?")[2])
        assert (ids, rest) == ([last], sorted(people, reverse=True))

    def test_next_link_of_the_longest_search_fits_into_a_header(self, stack: Stack, base_url: str) -> None:
        """The search has almost 100 letters of 4 bytes, and the cursor contains a name of as many."""
        word = "𝒳" * 45 + "𐐨" * 50
        created = [create(base_url, word, f"long{n}@example.com") for n in range(3)]
        try:
            ids, _ = read_pages(base_url, f"limit=1&q={quote(word)}&sort=-name")
            assert ids == created[::-1]
        finally:
            delete_all(base_url, created)


class TestCursors:
    @pytest.mark.parametrize("other", ["id", "name", "-email", "created_at"])
    def test_cursor_of_another_order_is_400(self, base_url: str, people: list[int], other: str) -> None:
        url = requests.get(f"{base_url}/users?limit=1&sort=email", timeout=5).links["next"]["url"]
        check_raw_problem(send_request(base_url, "GET", url.replace("sort=email", f"sort={other}")), 400, "cursor")

    @pytest.mark.parametrize(
        ("sort", "content"),
        [
            ("id", '["id","1",true]'),
            ("id", '["id","1",1.0]'),
            ("id", '["id","1","1"]'),
            ("id", '["id","1",0]'),
            ("id", '["id","1",-1]'),
            ("id", '["id","1",9223372036854775808]'),
            ("id", '["id",1,1]'),
            ("id", '["id","x",1]'),
            ("id", '["id","1) OR (true",1]'),
            ("id", '["id","99999999999999999999",1]'),
            ("id", '["id", "1", 1]'),
            ("id", '["id","1",1,1]'),
            ("id", '{"id":1,"1":2,"2":3}'),
            ("id", '"abc"'),
            ("id", "null"),
            ("id", "[" * 700),
            ("name", '["name","a\\u0000b",1]'),
            ("name", '["name","\\ud800",1]'),
            ("name", '["-name","a",1]'),
            ("created_at", '["created_at","now",1]'),
            ("created_at", '["created_at","infinity",1]'),
            ("created_at", '["created_at","2026-02-31 00:00:00+00",1]'),
            ("created_at", '["created_at","\'; DROP TABLE users; --",1]'),
        ],
    )
    def test_forged_cursor_is_400(self, base_url: str, sort: str, content: str) -> None:
        cursor = urlsafe_b64encode(content.encode()).rstrip(b"=").decode()
        for q in ("", "&q=alice"):
            check_raw_problem(send_request(base_url, "GET", f"/users?cursor={cursor}{q}&sort={sort}"), 400, "cursor")

    def test_cursor_in_another_spelling_is_400(self, base_url: str, people: list[int]) -> None:
        url = requests.get(f"{base_url}/users?limit=1&sort=email", timeout=5).links["next"]["url"]
        cursor = url.partition("cursor=")[2].partition("&")[0]
        for other in (
            f"{cursor}=",
            f"{cursor}==",
            f"={cursor}",
            f"{cursor[:4]}.{cursor[4:]}",
            f"{cursor}A",
            cursor[:-1],
        ):
            check_raw_problem(send_request(base_url, "GET", url.replace(cursor, quote(other))), 400, "cursor")


SEARCHES = [
    ("Alice Adams", "alice", True),
    ("Alice Adams", "ALICE", True),
    ("Alice Adams", "ali", True),
    ("Alice Adams", "a", True),
    ("Alice Adams", "ad al", True),
    ("Alice Adams", "  alice   adams ", True),
    ("Alice Adams", "lice", False),
    ("Alice Adams", "alice x", False),
    ("Alice Adams", "alicea", False),
    ("Alice Adams", "dams", False),
    ("Alice Adams", "alice & adams", True),
    ("Alice Adams", "- alice -", True),
    ("Plain", "- & -", False),
    ("O'Brien-Smith", "smith", True),
    ("O'Brien-Smith", "o'brien", True),
    ("O'Brien-Smith", "brien", True),
    ("Глеб Ёжиков", "глеб", True),
    ("Глеб Ёжиков", "ГЛЕБ ёж", True),
    ("Глеб Ёжиков", "г", True),
    ("Глеб Ёжиков", "леб", False),
    ("Zoë Müller", unicodedata.normalize("NFD", "zoë mü"), True),
    (unicodedata.normalize("NFD", "Zoë Müller"), "ZOË", True),
    ("Ｆｕｌｌ Width", "full", True),
    ("李明", "李", True),
    ("Agent 007", "007", True),
    ("Agent 007", "0", True),
    ("Agent 007", "7", False),
    ("100% sure", "100%", True),
    ("a_b", "a_b", True),
    ("axb", "a_b", False),
    ("Plain", "%", False),
    ("Plain", "_", False),
    ("Plain", "\\", False),
    ("Plain", "pla%n", False),
    ("Plain", "p_ain", False),
    ("Plain", "'", False),
    ("Plain", "@", False),
    ("Plain", "plain' OR 1=1 --", False),
    ("Plain", "searched", True),
    ("Plain", "searched@example", True),
    ("Plain", "searched@example.c", True),
    ("Plain", "@example.com", True),
    ("Plain", "example.searched", False),
    ("Plain", "plain searched@exam", True),
]


class TestSearch:
    @pytest.mark.parametrize(("name", "q", "matches"), SEARCHES)
    def test_search_matches_if_each_word_begins_a_word_of_the_name_or_the_email(
        self, base_url: str, name: str, q: str, matches: bool
    ) -> None:
        user = create(base_url, name, "searched@example.com")
        try:
            assert (user in found(base_url, q)) == matches
            assert counted(base_url, q) == len(found(base_url, q))
        finally:
            requests.delete(f"{base_url}/users/{user}", timeout=5)

    def test_search_treats_html_and_sql_as_plain_words(self, base_url: str) -> None:
        user = create(base_url, "<b>bold</b>'); DROP TABLE users; --", "sql@example.com")
        try:
            for q in ("<b>bold</b>", "'); DROP TABLE users; --", "bold drop"):
                assert found(base_url, q) == [user]
        finally:
            requests.delete(f"{base_url}/users/{user}", timeout=5)

    def test_both_query_plans_of_a_search_return_the_same_pages(
        self, stack: Stack, people: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With many matches the query tries the next rows of the order first, and all rows only if they do not fill
        the page."""
        with failpoint_app(stack) as app:
            rows = app.users.rows

            def pages(sort: str, limit: int) -> list[bytes]:
                found, cursor = [], ""
                while True:
                    stack.redis().delete("all_users")
                    entry = rows.page(Page(limit, sort, "keyset", cursor)).entry
                    found.append(entry.body + entry.link.encode())
                    if 'rel="next"' not in entry.link:
                        return found
                    cursor = entry.link.partition("cursor=")[2].partition("&")[0].partition(">")[0]

            for sort in SORTS:
                for limit in (2, 5, 50):
                    expected = pages(sort, limit)
                    monkeypatch.setattr(pagination, "SORTABLE_ROWS", -1)
                    for near in (1, 2, 1000):
                        monkeypatch.setattr(pagination, "scan_window", lambda page, *_, near=near: near * page.limit)
                        assert pages(sort, limit) == expected
                    monkeypatch.undo()

    @pytest.mark.parametrize("limit", [1, 20, 1000])
    def test_search_with_evenly_spread_matches_reads_few_of_a_million_rows_for_a_page(self, limit: int) -> None:
        """The query reads rows in order until the page is full, or sorts all matches; never both."""
        rows = 1_000_000
        for expected in range(pagination.SORTABLE_ROWS, rows, 1000):
            scanned = pagination.scan_window(Page(limit), expected, rows)
            if scanned:
                assert scanned * expected / rows >= 2 * limit * 0.9  # about twice as many matches as the page needs
                assert limit * rows / expected <= 25_000
            else:
                assert expected <= 50_000


def list_targets(word: str) -> list[str]:
    """Return addresses of lists and counts, each of which is a variant with an entry of its own."""
    return [
        "/users",
        "/users/count",
        f"/users/count?q={word}",
        f"/users?q={word}",
        f"/users?q={word}&sort=-name",
        f"/users?limit=999&q={word}&sort=email",
        f"/users?limit=1&q={word}",
        "/users?sort=-created_at",
        f"/users?email={word}@example.com",
        f"/users/count?email={word.upper()}@example.com&q={word}",
    ]


_numbers = count(1)


class TestFreshness:
    def read_all(self, stack: Stack, word: str) -> list[bytes]:
        """Return the bodies of all variants, which are the same through both edges."""
        bodies = [
            [requests.get(edge + target, timeout=5).content for target in list_targets(word)] for edge in stack.edges
        ]
        assert bodies[0] == bodies[1]
        return bodies[0]

    def warm(self, stack: Stack, word: str) -> list[bytes]:
        """Have both edges cache all variants; return their bodies."""
        for edge in stack.edges:
            for target in list_targets(word):
                wait_until(lambda url=edge + target: is_hit(url))  # type: ignore[misc]
        return self.read_all(stack, word)

    def test_each_kind_of_write_is_seen_in_every_list_through_both_edges(self, stack: Stack) -> None:
        word = f"fresh{next(_numbers)}"
        edge, other = stack.edges
        history = [self.warm(stack, word)]

        def check_is_seen(write: requests.Response) -> None:
            assert write.status_code < 300, write.text
            history.append(self.read_all(stack, word))
            assert self.warm(stack, word) == history[-1]

        created = requests.post(f"{edge}/users", json={"name": word, "email": f"{word}@example.com"}, timeout=5)
        check_is_seen(created)
        location, user_id = created.headers["Location"], created.json()["id"]
        check_is_seen(requests.put(other + location, json={"name": f"{word} put"}, timeout=5))
        check_is_seen(requests.patch(edge + location, json={"name": f"{word} patched"}, timeout=5))
        operations = [
            {"op": "update", "id": user_id, "name": f"{word} batch"},
            {"op": "create", "name": word, "email": f"{word}b@example.com"},
        ]
        batch = requests.post(f"{other}/users/batch", json={"operations": operations}, timeout=5)
        check_is_seen(batch)
        operations = [{"op": "delete", "id": batch.json()["results"][1]["id"]}]
        check_is_seen(requests.post(f"{edge}/users/batch", json={"operations": operations}, timeout=5))
        check_is_seen(requests.delete(other + location, timeout=5))
        totals, counts, searches, lookups = ([bodies[index] for bodies in history] for index in (1, 2, 3, 8))
        assert [lookup.count(b'"id":') for lookup in lookups] == [0, 1, 1, 1, 1, 1, 0]
        assert len(set(lookups)) == 5
        assert len(set(searches)) == 6
        assert searches[0] == searches[-1] == b"[]"
        assert counts == [b'{"count":%d}' % n for n in (0, 1, 1, 1, 2, 1, 0)]
        assert totals[0] == totals[-1]

    def test_sql_from_outside_is_seen_in_searches_and_counts(self, stack: Stack) -> None:
        word = f"fresh{next(_numbers)}"
        self.warm(stack, word)
        stack.sql("INSERT INTO users (name, email) VALUES (%s, %s)", word, f"{word}@example.com")
        for edge in stack.edges:
            wait_until(lambda edge=edge: counted(edge, word) == len(found(edge, word)) == 1, within=2)  # type: ignore[misc]
        stack.sql("DELETE FROM users WHERE name = %s", word)
        for edge in stack.edges:
            wait_until(lambda edge=edge: counted(edge, word) == len(found(edge, word)) == 0, within=2)  # type: ignore[misc]


@pytest.fixture(scope="module")
def app(stack: Stack) -> Iterator[FailpointApp]:
    with failpoint_app(stack) as app:
        wait_until(lambda: has_cache_lease(app.edge))
        yield app


@pytest.mark.parametrize("failpoint", READER_FAILPOINTS)
@pytest.mark.parametrize("size", [1, 100])
def test_search_that_a_batch_overtakes_leaves_no_old_entry(app: FailpointApp, failpoint: str, size: int) -> None:
    """A batch of a hundred rows takes the lock of every path, a batch of one row the locks of its own paths."""
    word = f"overtaken{next(_numbers)}"
    stack = app.stack
    ids: list[int] = []

    def write() -> None:
        operations = [{"op": "create", "name": word, "email": f"{word}{n}@example.com"} for n in range(size)]
        ids.extend(result["id"] for result in run_batch(stack.app, *operations))

    for target in (f"/users?q={word}&sort=name", f"/users/count?q={word}"):
        stack.redis().flushdb()
        app.failpoints.actions[failpoint] = write
        requests.get(app.edge + target, timeout=10)
        try:
            for edge in (app.edge, *stack.edges):
                for _ in range(2):
                    assert len(found(edge, word, "name")) == counted(edge, word) == size
        finally:
            delete_all(stack.app, ids)
            ids.clear()
