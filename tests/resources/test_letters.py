"""Case, accents and scripts: which e-mails are the same, which rows a search finds, and whom `?email=` finds."""

import re
import unicodedata
from collections.abc import Iterator

import psycopg
import pytest
import requests

from testkit.api import check_problem, is_hit
from testkit.stack import Stack, wait_until


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def post(base_url: str, name: str, email: str) -> requests.Response:
    return requests.post(f"{base_url}/users", json={"name": name, "email": email}, timeout=5)


def create(base_url: str, name: str, email: str) -> int:
    response = post(base_url, name, email)
    assert response.status_code == 201, response.text
    return int(response.json()["id"])


def delete(base_url: str, user: int) -> None:
    assert requests.delete(f"{base_url}/users/{user}", timeout=5).status_code == 200


def found(base_url: str, **parameters: str) -> list[int]:
    response = requests.get(f"{base_url}/users", params=parameters, timeout=5)
    assert response.status_code == 200, response.text
    counted = requests.get(f"{base_url}/users/count", params=parameters, timeout=5).json()
    ids = [row["id"] for row in response.json()]
    assert counted == {"count": len(ids)}
    return ids


SAME_EMAILS = [
    ("anna@example.com", "ANNA@Example.COM"),
    ("глеб@example.com", "ГЛЕБ@example.com"),
    ("σίσυφος@example.com", "ΣΊΣΥΦΟΣ@example.com"),
    ("σίσυφος@example.com", "σίσυφοσ@example.com"),
    ("straße@example.com", "STRASSE@example.com"),
    ("straße@example.com", "strasse@example.com"),
    ("straße@example.com", "STRAẞE@example.com"),
    ("jürgen@example.com", "JÜRGEN@example.com"),
    ("zoë@example.com", decomposed("ZOË") + "@example.com"),
    ("İnci@example.com", "i\u0307nci@example.com"),
    ("ﬁnn@example.com", "FINN@example.com"),
    ("Ǆ@example.com", "ǆ@example.com"),
    ("ᾳ@example.com", "ΑΙ@example.com"),
    ("ꮳꮃꭹ@example.com", "ᏣᎳᎩ@example.com"),
    ("ａｎｎａ@example.com", "anna@example.com"),
    ("anna@müller.example", "anna@MÜLLER.example"),
    ("anna@müller.example", "anna@xn--mller-kva.example"),
]
OTHER_EMAILS = [
    ("zoe@example.com", "zoë@example.com"),
    ("łukasz@example.com", "lukasz@example.com"),
    ("ıssız@example.com", "issiz@example.com"),
    ("ıssız@example.com", "ISSIZ@example.com"),
    ("İnci@example.com", "inci@example.com"),
    ("й@example.com", "и@example.com"),
    ("a.b@example.com", "ab@example.com"),
    ("a+b@example.com", "a@example.com"),
]


class TestEmails:
    @pytest.mark.parametrize(("email", "other"), SAME_EMAILS)
    def test_emails_that_unicode_compares_as_equal_are_one_and_find_each_other(
        self, stack: Stack, base_url: str, email: str, other: str
    ) -> None:
        for first, second in ((email, other), (other, email)):
            user = create(base_url, "First", first)
            try:
                check_problem(post(base_url, "Second", second), 409, "email")
                assert found(base_url, email=first) == found(base_url, email=second) == [user]
                row = requests.get(f"{base_url}/users/{user}", timeout=5).json()
                assert requests.put(f"{base_url}/users/{user}", json={"email": second}, timeout=5).status_code == 200
                assert found(base_url, email=row["email"]) == [user]
            finally:
                delete(base_url, user)
            assert found(base_url, email=first) == []

    @pytest.mark.parametrize(("email", "other"), OTHER_EMAILS)
    def test_emails_with_other_letters_or_accents_are_different(self, base_url: str, email: str, other: str) -> None:
        users = [create(base_url, "One", email), create(base_url, "Other", other)]
        try:
            assert [found(base_url, email=email), found(base_url, email=other)] == [[users[0]], [users[1]]]
        finally:
            for user in users:
                delete(base_url, user)

    def test_batch_names_each_operation_whose_email_is_taken_in_another_case(self, base_url: str) -> None:
        emails = (
            "straße@example.com",
            "other@example.com",
            "STRASSE@example.com",
            "ΟΔΌΣ@example.com",
            "οδός@example.com",
        )
        operations = [{"op": "create", "name": "B", "email": email} for email in emails]
        response = requests.post(f"{base_url}/users/batch", json={"operations": operations}, timeout=5)
        check_problem(response, 409)
        assert [error["field"] for error in response.json()["errors"]] == ["operations.2.email", "operations.4.email"]

    def test_sql_from_outside_cannot_store_an_equal_email(self, stack: Stack) -> None:
        user = create(stack.app, "Straße", "straße@example.com")
        try:
            with pytest.raises(psycopg.errors.UniqueViolation):
                stack.sql("INSERT INTO users (name, email) VALUES ('B', 'STRASSE@example.com')")
        finally:
            delete(stack.app, user)


class TestEmailParameter:
    @pytest.fixture
    def user(self, base_url: str) -> Iterator[int]:
        user = create(base_url, "Plus", "Letters+tag@example.com")
        yield user
        delete(base_url, user)

    @pytest.mark.parametrize(
        "query",
        [
            "email=letters%2Btag@example.com",
            "email=LETTERS%2BTAG%40EXAMPLE.COM",
            "email=letters%2btag@example.com&limit=1&sort=-name",
            "sort=email&q=plus&email=letters%2Btag@example.com",
        ],
    )
    def test_email_finds_exactly_its_user(self, base_url: str, user: int, query: str) -> None:
        response = requests.get(f"{base_url}/users?{query}", timeout=5)
        assert [row["id"] for row in response.json()] == [user]
        assert "Link" not in response.headers

    @pytest.mark.parametrize(
        "email",
        [
            "letters",
            "letters+ta@example.com",
            "etters+tag@example.com",
            "letters+tag@example.co",
            "%",
            "l_tters+tag@example.com",
            "Plus",
        ],
    )
    def test_part_of_an_email_or_a_pattern_finds_nobody(self, base_url: str, user: int, email: str) -> None:
        assert found(base_url, email=email) == []

    def test_email_is_one_condition_among_others(self, base_url: str, user: int) -> None:
        assert found(base_url, email="letters+tag@example.com", q="plus") == [user]
        assert found(base_url, email="letters+tag@example.com", q="minus") == []
        url = requests.get(f"{base_url}/users?limit=1&sort=-id", timeout=5).links["next"]["url"]
        assert requests.get(f"{base_url}{url}&email=letters%2Btag@example.com", timeout=5).json() == []

    def test_unencoded_plus_is_400_with_a_hint(self, base_url: str, user: int) -> None:
        for path in ("/users", "/users/count"):
            response = requests.get(f"{base_url}{path}?email=letters+tag@example.com", timeout=5)
            check_problem(response, 400, "email")
            assert "%2B" in response.json()["detail"]

    @pytest.mark.parametrize(
        "query",
        [
            "email=",
            "email",
            "email=%20",
            "email=a%00@example.com",
            "email=%0a",
            "email=%ff",
            "email=a@b&email=a@b",
            "email=" + "a" * 255,
            "email=%E3%80%80",
        ],
    )
    def test_invalid_email_parameter_is_400(self, base_url: str, query: str) -> None:
        for path in ("/users", "/users/count"):
            for _ in range(2):
                check_problem(requests.get(f"{base_url}{path}?{query}", timeout=5), 400, "email")

    def test_address_that_only_sql_can_store_is_found(self, stack: Stack) -> None:
        stack.sql("INSERT INTO users (name, email) VALUES ('Odd', 'Not An-Email!')")
        stack.sql("INSERT INTO users (name, email) VALUES ('Odd', 'Odd!')")
        try:
            wait_until(lambda: len(found(stack.edge, email="ODD!")) == 1, within=5)
        finally:
            stack.sql("DELETE FROM users WHERE name = 'Odd'")

    def test_change_of_an_email_is_seen_at_once_under_every_spelling_through_both_edges(self, stack: Stack) -> None:
        user = create(stack.edge, "Moves", "here@example.com")
        spellings = ["email=here@example.com", "email=HERE%40example.com", "limit=5&email=%68ere@example.com"]
        urls = [f"{edge}/users?{spelling}" for edge in stack.edges for spelling in spellings]
        try:
            for _ in range(5):
                for email, ids in (("there@example.com", []), ("Here@example.com", [user])):
                    for url in urls:
                        wait_until(lambda url=url: is_hit(url))  # type: ignore[misc]
                    changed = requests.patch(f"{stack.edges[1]}/users/{user}", json={"email": email}, timeout=5)
                    assert changed.status_code == 200
                    for url in urls:
                        assert [row["id"] for row in requests.get(url, timeout=5).json()] == ids
        finally:
            delete(stack.edge, user)


SEARCHES = [
    # Accents, and letters that Unicode does not decompose.
    ("Zoë Łukasz", "zoe", True),
    ("Zoë Łukasz", "lukasz", True),
    ("Zoe Lukasz", "zoë łukasz", True),
    ("Zoë Łukasz", "ZOE ŁUK", True),
    (decomposed("Zoë Ångström"), "zoe angstrom", True),
    ("Zoe", decomposed("zoë"), True),
    ("Zoë", "zo", True),
    ("Zoë", "oe", False),
    ("José Núñez", "jose nunez", True),
    ("François Crépin", "francois crepin", True),
    ("Søren Åse", "soren ase", True),
    ("Æsir Þór", "aesir thor", True),
    ("Nguyễn Thị Đào", "nguyen thi dao", True),
    ("Čeněk Dvořák", "cenek dvorak", True),
    ("Ștefan Țepeș", "stefan tepes", True),
    ("Ħal Għaxaq", "hal ghaxaq", True),
    ("Ƙasimu Ɗan", "kasimu dan", True),
    ("Ёлкин Андрей", "елкин андрей", True),
    ("Елкин", "ёлкин", True),
    ("Ἀχιλλεύς", "αχιλλευς", True),
    ("שָׁלוֹם", "שלום", True),
    ("مُحَمَّد أحمد", "محمد احمد", True),
    ("Hawaiʻi ʿAlī", "hawaii ali", True),
    # Case.
    ("Straße", "strasse", True),
    ("STRASSE", "straße", True),
    ("Straße", "STRAẞE", True),
    ("ΟΔΥΣΣΕΥΣ", "οδυσσευς", True),
    ("Οδυσσεύς", "ΟΔΥΣΣΕΎΣ", True),
    ("Οδυσσεύς", "οδυσσευσ", True),
    ("İstanbul", "istanbul", True),
    ("istanbul", "İSTANBUL", True),
    ("ISTANBUL", "ıstanbul", True),
    ("ﬁnn", "finn", True),
    ("Ａｎｎａ", "anna", True),
    # Scripts without spaces: any part of the text, in its order.
    ("李小明", "小明", True),
    ("李小明", "明", True),
    ("李小明", "李明", False),
    ("李小明", "明小", False),
    ("李小明", "李 明", True),
    ("東京都庁", "京都", True),
    ("山田たろう", "たろ", True),
    ("山田タロウ", "ロウ", True),
    ("山田ﾀﾛｳ", "タロウ", True),
    ("ガギグ", "カキク", False),
    ("ラーメン", "メン", True),
    ("สมชาย ใจดี", "ชาย", True),
    ("น้ำใจ", "ใจ", True),
    ("ກາລະເກດ", "ເກດ", True),
    ("សុខា", "ខា", True),
    ("မောင်မောင်", "မောင်", True),
    ("김철수", "철수", True),
    ("김철수", "김수", False),
    ("田中Taro", "taro", True),
    ("Taro田中", "田中", True),
    ("Taro田中", "aro", False),
    ("𠮷野家", "野家", True),
    ("李・明", "李明", True),
    # Scripts with spaces: the beginnings of words.
    ("हिन्दी भाषा", "हिन्दी", True),
    ("हिन्दी भाषा", "भाषा", True),
    ("Anna-Lena", "lena", True),
    ("An\u00adna", "anna", True),
]


class TestSearch:
    @pytest.mark.parametrize(("name", "q", "matches"), SEARCHES)
    def test_search_ignores_case_and_accents_and_finds_parts_of_texts_without_spaces(
        self, base_url: str, name: str, q: str, matches: bool
    ) -> None:
        user = create(base_url, name, "letters@example.com")
        try:
            assert (user in found(base_url, q=q)) == matches
        finally:
            delete(base_url, user)

    @pytest.mark.parametrize(
        ("condition", "index"),
        [
            *((f"words LIKE '%' || words('{q}') || '%'", "users_words") for q in ("zoe", "東京", "สม", "김")),
            ("folded(email) = folded('Alice@example.com')", "users_email_caseless"),
        ],
    )
    def test_search_and_email_parameter_use_an_index(self, stack: Stack, condition: str, index: str) -> None:
        with psycopg.connect(stack.postgres, options="-c enable_seqscan=off") as connection:
            plan = connection.execute(f"EXPLAIN SELECT FROM users WHERE {condition}").fetchall()
        assert index in str(plan)


def test_sql_folds_every_character_as_unicode_does(stack: Stack) -> None:
    """NFKC_Casefold, for the characters that Python's version of Unicode knows."""

    def folded(text: str) -> str:
        once = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text)).casefold()
        return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", once).casefold())

    characters = [chr(n) for n in range(1, 0x110000) if unicodedata.category(chr(n)) not in ("Cn", "Co", "Cs")]
    assert len(characters) > 140_000
    rows = stack.sql("SELECT c, folded(c) FROM unnest(%s::text[]) c", characters)
    ignorable = re.compile(
        "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
        "\u3164\ufe00-\ufe0f\ufeff\uffa0\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    )
    # Cherokee: Unicode folds it to capital letters, SQL to small ones.
    wrong = [c for c, by_sql in rows if by_sql not in (folded(c), unicodedata.normalize("NFKC", folded(c).lower()))]
    assert [c for c in wrong if not ignorable.fullmatch(c)] == []
    assert all(by_sql == "" for c, by_sql in rows if ignorable.fullmatch(c))
    again = stack.sql("SELECT count(*) FROM unnest(%s::text[]) c WHERE folded(folded(c)) <> folded(c)", characters)
    assert again == [(0,)]
