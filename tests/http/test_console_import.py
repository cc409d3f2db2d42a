"""Imports that arrive in pieces, as the console sends them."""

import gzip
import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import requests

from testkit.api import check_problem
from testkit.stack import Stack

_numbers = count(1)
_keys = count(1)


@pytest.fixture
def domain(stack: Stack) -> Iterator[str]:
    """A domain for the addresses of one test, whose users are deleted afterwards."""
    domain = f"import{next(_numbers)}.example.com"
    yield domain
    stack.sql("DELETE FROM users WHERE email LIKE %s", f"%@{domain}")


def send(stack: Stack, address: str, options: dict[str, Any], content: bytes, **headers: str) -> requests.Response:
    body = json.dumps(options).encode() + b"\n" + content
    headers = {"Content-Type": "application/octet-stream", **headers}
    return requests.post(f"{stack.edge}/console/import{address}", data=body, headers=headers, timeout=30)


def preview(stack: Stack, content: bytes, **options: Any) -> dict[str, Any]:
    response = send(stack, "/preview", {"is_last": True, **options}, content)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


class Sender:
    """Sends a file in pieces of one size, as static/import_job.js does."""

    def __init__(self, stack: Stack, content: bytes, size: int, **options: Any) -> None:
        self.stack, self.content, self.size, self.options = stack, content, size, options
        self.name = f"import-{next(_keys)}"
        self.rejects: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.offset, self.place = 0, {"head": 0, "line": 0, "done": 0}

    def piece(self) -> requests.Response:
        end = self.offset + self.size
        head = self.content[: self.place["head"]] if self.offset else b""
        options = {**self.options, **self.place, "head": len(head), "is_last": end >= len(self.content)}
        key = f"{self.name}-{self.offset}-{self.place['done']}-{self.size}"
        content = head + self.content[self.offset : end]
        return send(self.stack, "", options, content, **{"Idempotency-Key": key})

    def run(self) -> dict[str, int]:
        while True:
            response = self.piece()
            assert response.status_code == 200, response.text
            result = response.json()
            self.results.append(result)
            self.rejects += [json.loads(line) for line in result["rejects"].splitlines()]
            if not result["read"] and result["done"] == self.place["done"]:
                self.size *= 2
            self.offset += result["read"]
            self.place = {name: result[name] for name in ("head", "line", "done")}
            if result["is_end"]:
                names = ("created", "updated", "unchanged", "skipped", "rejected")
                return {name: sum(each[name] for each in self.results) for name in names}


def test_file_in_pieces_creates_each_row_once(stack: Stack, domain: str) -> None:
    content = "name,email\n" + "".join(f"Person {n},p{n}@{domain}\n" for n in range(2100))
    sender = Sender(stack, content.encode(), 40_000)
    assert sender.run() == {"created": 2100, "updated": 0, "unchanged": 0, "skipped": 0, "rejected": 0}
    assert len(sender.results) >= 3
    assert stack.sql("SELECT count(*), count(DISTINCT email) FROM users WHERE email LIKE %s", f"%@{domain}") == [
        (2100, 2100)
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1251"])
def test_pieces_are_cut_anywhere_in_any_encoding(stack: Stack, domain: str, encoding: str) -> None:
    content = "sep=;\nE-Mail;Имя\n" + "".join(f'p{n}@{domain};"Жан\t{n}"\n' for n in range(60))
    content = content.replace("\t", " ")
    options = {"maps": ["Имя=name", "E-Mail=email"], **({"encoding": encoding} if encoding == "cp1251" else {})}
    assert Sender(stack, content.encode(encoding), 301, **options).run()["created"] == 60
    names = {name for (name,) in stack.sql("SELECT name FROM users WHERE email LIKE %s", f"%@{domain}")}
    assert names == {f"Жан {n}" for n in range(60)}


def test_json_that_cannot_be_cut_is_imported_as_a_whole(stack: Stack, domain: str) -> None:
    rows = [{"name": "A", "email": f"p{n}@{domain}"} for n in range(1200)]
    content = json.dumps({"users": rows}).encode()
    assert preview(stack, content)["is_whole"]
    sender = Sender(stack, content, len(content))
    assert sender.run()["created"] == 1200
    assert [result["done"] for result in sender.results] == [1000, 1200]
    check_problem(send(stack, "/preview", {"is_last": False}, content[:1000]), 422)


def test_rejected_rows_have_their_lines_and_can_be_imported_again(stack: Stack, domain: str) -> None:
    content = f"name,email\nA,a@{domain}\nB,nonsense\nC,c@{domain}\nD,A@{domain}\n,e@{domain}\n"
    sender = Sender(stack, content.encode(), 40)
    assert sender.run() == {"created": 2, "updated": 0, "unchanged": 0, "skipped": 0, "rejected": 3}
    assert [(reject["line"], reject["errors"][0]["field"]) for reject in sender.rejects] == [
        (3, "email"),
        (5, "email"),
        (6, "name"),
    ]
    repaired = "".join(json.dumps(reject) + "\n" for reject in sender.rejects)
    repaired = repaired.replace("nonsense", f"b@{domain}").replace(f"A@{domain}", f"d@{domain}")
    again = Sender(stack, repaired.encode(), 10_000)
    assert again.run()["created"] == 2
    assert again.rejects[0]["row"] == {"name": "", "email": f"e@{domain}"}


def test_repeated_piece_is_carried_out_once_and_reports_the_same(stack: Stack, domain: str) -> None:
    content = f"name,email\nA,a@{domain}\nB,nonsense\nC,A@{domain}\n".encode()
    sender = Sender(stack, content, 1000)
    first = sender.piece()
    second = sender.piece()
    assert second.headers["Idempotency-Replayed"] == "true"
    assert second.json() == first.json()
    assert (first.json()["created"], first.json()["rejected"]) == (1, 2)
    assert len(first.json()["rejects"].splitlines()) == 2
    stored = stack.sql("SELECT response::text FROM idempotency_keys WHERE key LIKE %s", f"%{sender.name}-%")
    assert len(stored) == 1
    assert domain not in stored[0][0]


@pytest.mark.parametrize(
    ("on_conflict", "expected"), [("skip", ("skipped", 1)), ("update", ("updated", 1)), ("reject", ("rejected", 1))]
)
def test_taken_address_is_treated_as_chosen(
    stack: Stack, domain: str, on_conflict: str, expected: tuple[str, int]
) -> None:
    created = requests.post(f"{stack.edge}/users", json={"name": "Old", "email": f"a@{domain}"}, timeout=5).json()
    address = f"{stack.edge}/users/{created['id']}"
    assert requests.get(address, timeout=5).json()["name"] == "Old"
    content = f"name,email\nNew,a@{domain}\n".encode()
    name, number = expected
    assert Sender(stack, content, 1000, on_conflict=on_conflict).run()[name] == number
    read = requests.get(address, timeout=5).json()["name"]  # never stale, although it was cached
    assert read == ("New" if on_conflict == "update" else "Old")


def test_preview_shows_the_columns_and_rows_and_writes_nothing(stack: Stack, domain: str) -> None:
    content = f"First Name,Last Name,E-mail 1 - Value,Labels\nAnn,Lee,a@{domain},x\nBob,,nonsense,x\n".encode()
    shown = preview(stack, content)
    assert shown["names"] == ["First Name", "Last Name", "E-mail 1 - Value", "Labels"]
    assert shown["columns"]["email"] == [["E-mail 1 - Value"]]
    assert shown["rows"][0]["values"] == {"name": "Ann Lee", "email": f"a@{domain}"}
    assert shown["rows"][1]["errors"][0]["field"] == "email"
    assert (shown["format"], shown["encoding"], shown["is_whole"]) == ("csv", "utf-8", False)
    assert stack.sql("SELECT count(*) FROM users WHERE email LIKE %s", f"%@{domain}") == [(0,)]


def test_preview_of_unknown_columns_lets_the_page_choose(stack: Stack) -> None:
    content = b"Wer,Wohin\nAnn,a@example.com\n"
    shown = preview(stack, content)
    assert (shown["names"], shown["columns"], shown["rows"]) == (["Wer", "Wohin"], None, [])
    shown = preview(stack, content, maps=["Wer=name", "Wohin=email"])
    assert shown["rows"][0]["values"] == {"name": "Ann", "email": "a@example.com"}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (gzip.compress(b"name,email\n", mtime=0), "gzip"),
        ("name,email\nЖ,a@example.com\nЖук,b@example.com\n".encode("cp1251"), "is not UTF-8"),
        (b"%PDF-1.7", "a PDF"),
        (b"name,name,email\n", "twice"),
        (b"", "empty"),
        (b"name,phone\nAnn,1\n", "lacks email"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_the_reason(stack: Stack, content: bytes, part: str) -> None:
    for address in ("/preview", ""):
        if (response := send(stack, address, {"is_last": True}, content)).status_code == 200:
            assert response.json()["columns"] is None  # the page lets its user choose
            continue
        detail = check_problem(response, 422)
        assert part in detail
        assert "--" not in detail  # the page has no options of a command line


@pytest.mark.parametrize(
    "options",
    ["", "{}x", '{"rows": 1001}', '{"on_conflict": "drop"}', '{"head": -1}', '{"other": 1}', '{"resource": "nothing"}'],
)
def test_options_are_checked(stack: Stack, options: str) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    body = f"{options}\nname,email\n"
    response = requests.post(f"{stack.edge}/console/import", data=body, headers=headers, timeout=5)
    assert response.status_code in (400, 422)
    assert response.headers["Content-Type"] == "application/problem+json"


def test_import_follows_the_rules_for_writes_of_web_pages(stack: Stack) -> None:
    content = b"name,email\n"
    check_problem(send(stack, "", {"is_last": True}, content, **{"Content-Type": "text/plain"}), 415)
    check_problem(send(stack, "", {"is_last": True}, content, **{"Sec-Fetch-Site": "cross-site"}), 403)
    check_problem(send(stack, "", {"is_last": True}, bytes(2 * 1024 * 1024)), 413)
