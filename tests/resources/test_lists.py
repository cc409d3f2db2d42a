"""Pages, orders and searches: each row once and in its place, and what was written is seen at once, whatever was asked."""

import unicodedata
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from itertools import count
from typing import Any
from urllib.parse import quote

import pytest
import requests

from testkit.failpoints import FailpointApp, failpoint_app
from testkit.raw_http import ask, check
from testkit.stack import Stack, wait_until
from velikiy.resources import pagination
from velikiy.resources.pagination import Page

NAMES = [
    *("Anna", "anna", "ÄNNA", "Ännä", "Bob", "bob", "Çelik", "Zoë", "zoe", "Ирина", "ирина", "Йорк", "Ёлка", "Елка"),
    *("李明", "🙂 Smile", "_under", "100%", "O'Brien", "Same", "Same", "Same", "Same"),
]
SORTS = ["id", "-id", "name", "-name", "email", "-email", "created_at", "-created_at"]
ORDERS = {"id": "id", "name": 'name COLLATE "und-x-icu"', "email": "lower(email)", "created_at": "created_at"}


def batch(base_url: str, *operations: dict[str, Any]) -> list[dict[str, Any]]:
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
    """Some with the same name, all with the same time; each has the word Keyset."""
    made = batch(
        stack.app,
        *(
            {"op": "create", "name": f"{name} Keyset", "email": f"{'kK'[n % 2]}eyset{n * 7 % 23}@example.com"}
            for n, name in enumerate(NAMES)
        ),
    )
    ids = [result["id"] for result in made]
    stack.sql("UPDATE users SET created_at = created_at - interval '1 hour' WHERE id = ANY(%s)", ids[::3])
    stack.redis().flushdb()
    wait_until(lambda: all(ids[0] in found(edge, "Keyset", "-created_at") for edge in stack.edges))
    yield ids
    batch(stack.app, *({"op": "delete", "id": number} for number in ids))


def walk(base_url: str, query: str) -> tuple[list[int], list[dict[str, Any]]]:
    """All pages: ids, and the links of each."""
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


class TestPages:
    @pytest.mark.parametrize("sort", SORTS)
    @pytest.mark.parametrize("limit", [1, 3, 1000])
    def test_every_order_holds_each_row_once_and_in_its_place(
        self, stack: Stack, base_url: str, people: list[int], sort: str, limit: int
    ) -> None:
        by, way = ORDERS[sort.removeprefix("-")], "DESC" if sort.startswith("-") else "ASC"
        rows = stack.sql(f"SELECT id FROM users WHERE id = ANY(%s) ORDER BY {by} {way}, id {way}", people)
        ids, _ = walk(base_url, f"limit={limit}&q=keyset&sort={sort}")
        assert ids == [row[0] for row in rows]

    @pytest.mark.parametrize("sort", SORTS)
    def test_so_does_one_without_a_search(self, stack: Stack, base_url: str, people: list[int], sort: str) -> None:
        by, way = ORDERS[sort.removeprefix("-")], "DESC" if sort.startswith("-") else "ASC"
        ids, _ = walk(base_url, f"limit=7&sort={sort}")
        assert ids == [row[0] for row in stack.sql(f"SELECT id FROM users ORDER BY {by} {way}, id {way}")]
        assert set(people) <= set(ids)

    def test_letters_sort_as_people_do_and_not_as_codes(self, base_url: str, people: list[int]) -> None:
        rows = requests.get(f"{base_url}/users?q=keyset&sort=name", timeout=5).json()
        names = [row["name"].removesuffix(" Keyset") for row in rows]
        assert names.index("anna") < names.index("Bob") < names.index("Çelik") < names.index("Zoë")
        assert names.index("Елка") < names.index("Ирина") < names.index("Йорк")

    def test_links_lead_on_and_back_and_keep_what_was_asked(self, base_url: str, people: list[int]) -> None:
        _, links = walk(base_url, "limit=10&q=Keyset&sort=-name")
        assert [sorted(page) for page in links] == [["first", "next"], ["first", "next"], ["first"]]
        assert {page["first"]["url"] for page in links} == {"/users?limit=10&q=Keyset&sort=-name"}
        assert walk(base_url, "q=keyset")[1] == [{}]

    def test_a_page_that_is_just_full_has_no_next(self, base_url: str, people: list[int]) -> None:
        _, links = walk(base_url, f"limit={len(people)}&q=keyset")
        assert links == [{}]

    def test_what_comes_and_goes_between_pages_neither_repeats_nor_hides_others(
        self, stack: Stack, base_url: str, people: list[int]
    ) -> None:
        first = requests.get(f"{base_url}/users?limit=5&q=keyset&sort=name", timeout=5)
        seen = [row["id"] for row in first.json()]
        before = create(base_url, "!Before Keyset", "before@example.com")
        gone = create(base_url, "Zzz Keyset", "gone@example.com")
        try:
            requests.delete(f"{base_url}/users/{gone}", timeout=5)
            rest, _ = walk(base_url, first.links["next"]["url"].partition("?")[2])
        finally:
            requests.delete(f"{base_url}/users/{before}", timeout=5)
        assert sorted(seen + rest) == sorted(people)

    def test_a_cursor_goes_on_although_its_row_is_gone(self, base_url: str, people: list[int]) -> None:
        last = create(base_url, "Last Keyset", "gone@example.com")
        first = requests.get(f"{base_url}/users?limit=1&q=keyset&sort=-id", timeout=5)
        ids = [row["id"] for row in first.json()]
        requests.delete(f"{base_url}/users/{last}", timeout=5)
        rest, _ = walk(base_url, first.links["next"]["url"].partition("?")[2])
        assert (ids, rest) == ([last], sorted(people, reverse=True))

    def test_the_largest_page_of_the_longest_search_has_a_link_that_works(self, stack: Stack, base_url: str) -> None:
        """Headers have an end, too: 100 letters of 4 bytes, and a cursor that holds a name of as many."""
        word = "𝒳" * 45 + "𐐨" * 50
        made = [create(base_url, word, f"long{n}@example.com") for n in range(3)]
        try:
            ids, _ = walk(base_url, f"limit=1&q={quote(word)}&sort=-name")
            assert ids == made[::-1]
        finally:
            batch(base_url, *({"op": "delete", "id": number} for number in made))


class TestCursors:
    @pytest.mark.parametrize("other", ["id", "name", "-email", "created_at"])
    def test_a_cursor_is_for_one_order(self, base_url: str, people: list[int], other: str) -> None:
        url = requests.get(f"{base_url}/users?limit=1&sort=email", timeout=5).links["next"]["url"]
        check(ask(base_url, "GET", url.replace("sort=email", f"sort={other}")), 400, "cursor")

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
    def test_a_forged_one_is_400(self, base_url: str, sort: str, content: str) -> None:
        cursor = urlsafe_b64encode(content.encode()).rstrip(b"=").decode()
        for q in ("", "&q=alice"):
            check(ask(base_url, "GET", f"/users?cursor={cursor}{q}&sort={sort}"), 400, "cursor")

    def test_one_cursor_has_one_spelling(self, base_url: str, people: list[int]) -> None:
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
            check(ask(base_url, "GET", url.replace(cursor, quote(other))), 400, "cursor")


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
    @pytest.mark.parametrize(("name", "q", "there"), SEARCHES)
    def test_each_word_is_or_begins_a_word_of_name_or_email(
        self, base_url: str, name: str, q: str, there: bool
    ) -> None:
        user = create(base_url, name, "searched@example.com")
        try:
            assert (user in found(base_url, q)) == there
            assert counted(base_url, q) == len(found(base_url, q))
        finally:
            requests.delete(f"{base_url}/users/{user}", timeout=5)

    def test_html_and_sql_are_words_like_others(self, base_url: str) -> None:
        user = create(base_url, "<b>bold</b>'); DROP TABLE users; --", "sql@example.com")
        try:
            for q in ("<b>bold</b>", "'); DROP TABLE users; --", "bold drop"):
                assert found(base_url, q) == [user]
        finally:
            requests.delete(f"{base_url}/users/{user}", timeout=5)

    def test_the_two_ways_to_a_page_lead_to_the_same(
        self, stack: Stack, people: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of many finds the next in the order are tried first, and all only where these do not fill the page."""
        with failpoint_app(stack) as app:
            rows = app.users.rows

            def walked(sort: str, limit: int) -> list[bytes]:
                responses, cursor = [], ""
                while True:
                    stack.redis().delete("all_users")
                    entry = rows.page(Page(limit, sort, "keyset", cursor)).entry
                    responses.append(entry.body + entry.link.encode())
                    if 'rel="next"' not in entry.link:
                        return responses
                    cursor = entry.link.partition("cursor=")[2].partition("&")[0].partition(">")[0]

            for sort in SORTS:
                for limit in (2, 5, 50):
                    usual = walked(sort, limit)
                    monkeypatch.setattr(pagination, "FEW", -1)
                    for near in (1, 2, 1000):
                        monkeypatch.setattr(pagination, "near", lambda page, *_, near=near: near * page.limit)
                        assert walked(sort, limit) == usual
                    monkeypatch.undo()

    @pytest.mark.parametrize("limit", [1, 20, 1000])
    def test_no_search_looks_at_many_rows_for_a_page_if_what_it_finds_lies_evenly(self, limit: int) -> None:
        """Of a million. Those that an order passes until the page is full, or those that are sorted; never both."""
        rows = 1_000_000
        for expected in range(pagination.FEW, rows, 1000):
            looked_at = pagination.near(Page(limit), expected, rows)
            if looked_at:
                assert looked_at * expected / rows >= 2 * limit * 0.9  # it is enough, with room
                assert limit * rows / expected <= 25_000
            else:
                assert expected <= 50_000


def looks(word: str) -> list[str]:
    """Whatever a list is asked for: each is an entry of its own."""
    return [
        "/users",
        "/users/count",
        f"/users/count?q={word}",
        f"/users?q={word}",
        f"/users?q={word}&sort=-name",
        f"/users?limit=999&q={word}&sort=email",
        f"/users?limit=1&q={word}",
        "/users?sort=-created_at",
    ]


_numbers = count(1)


class TestFreshness:
    def seen(self, stack: Stack, word: str) -> list[bytes]:
        """By both edges, which have to say the same."""
        responses = [[requests.get(edge + look, timeout=5).content for look in looks(word)] for edge in stack.edges]
        assert responses[0] == responses[1]
        return responses[0]

    def warm(self, stack: Stack, word: str) -> list[bytes]:
        for edge in stack.edges:
            for look in looks(word):
                wait_until(lambda url=edge + look: requests.get(url, timeout=5).headers["X-Cache-Status"] == "HIT")  # type: ignore[misc]
        return self.seen(stack, word)

    def test_each_kind_of_write_is_seen_in_every_list_through_both_edges(self, stack: Stack) -> None:
        word = f"fresh{next(_numbers)}"
        edge, other = stack.edges
        history = [self.warm(stack, word)]

        def step(change: requests.Response) -> None:
            assert change.status_code < 300, change.text
            history.append(self.seen(stack, word))
            assert self.warm(stack, word) == history[-1]

        made = requests.post(f"{edge}/users", json={"name": word, "email": f"{word}@example.com"}, timeout=5)
        step(made)
        place = made.headers["Location"]
        step(requests.put(other + place, json={"name": f"{word} put"}, timeout=5))
        step(requests.patch(edge + place, json={"name": f"{word} patched"}, timeout=5))
        number = made.json()["id"]
        many = [
            {"op": "update", "id": number, "name": f"{word} batch"},
            {"op": "create", "name": word, "email": f"{word}b@example.com"},
        ]
        response = requests.post(f"{other}/users/batch", json={"operations": many}, timeout=5)
        step(response)
        new = response.json()["results"][1]["id"]
        many = [{"op": "delete", "id": new}]
        step(requests.post(f"{edge}/users/batch", json={"operations": many}, timeout=5))
        step(requests.delete(other + place, timeout=5))
        names = [responses[3] for responses in history]  # of the search
        assert len(set(names)) == 6
        assert names[0] == names[-1] == b"[]"
        counts = [responses[2] for responses in history]
        assert counts == [b'{"count":%d}' % n for n in (0, 1, 1, 1, 2, 1, 0)]
        assert history[0][1] == history[-1][1]

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
def stepped(stack: Stack) -> Iterator[FailpointApp]:
    with failpoint_app(stack) as app:
        wait_until(lambda: not requests.get(f"{app.edge}/.edge", timeout=5).text.endswith(" 0"))
        yield app


@pytest.mark.parametrize(
    "place", ["between probe and snapshot", "between snapshot and fill", "between fill and response"]
)
@pytest.mark.parametrize("many", [1, 100])
def test_a_search_that_a_batch_overtakes_leaves_nothing_old(stepped: FailpointApp, place: str, many: int) -> None:
    """Of one row as of a hundred, which are locked as everything."""
    word = f"overtaken{next(_numbers)}"
    stack = stepped.stack
    ids: list[int] = []

    def write() -> None:
        operations = [{"op": "create", "name": word, "email": f"{word}{n}@example.com"} for n in range(many)]
        ids.extend(result["id"] for result in batch(stack.app, *operations))

    for look in (f"/users?q={word}&sort=name", f"/users/count?q={word}"):
        stack.redis().flushdb()
        stepped.failpoints.actions[place] = write
        requests.get(stepped.edge + look, timeout=10)
        try:
            for edge in (stepped.edge, *stack.edges):
                for _ in range(2):
                    assert len(found(edge, word, "name")) == counted(edge, word) == many
        finally:
            batch(stack.app, *({"op": "delete", "id": number} for number in ids))
            ids.clear()
