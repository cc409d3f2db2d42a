"""Downloads of all rows, as the console starts them."""

import csv
import io
import json
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
import requests

from testkit.api import check_problem
from testkit.stack import Stack, wait_until


def address(stack: Stack, file_format: str = "csv") -> str:
    response = requests.get(f"{stack.edge}/console/export?format={file_format}", timeout=5)
    assert response.status_code == 200, response.text
    assert response.headers["Cache-Control"] == "no-store"
    return stack.edge + str(response.json()["address"])


@pytest.mark.parametrize("file_format", ["csv", "excel", "ndjson"])
def test_download_has_every_row_in_its_format(stack: Stack, file_format: str) -> None:
    response = requests.get(address(stack, file_format), timeout=10)
    suffix = "ndjson" if file_format == "ndjson" else "csv"
    assert response.headers["Content-Disposition"] == f'attachment; filename="users.{suffix}"'
    assert response.headers["Cache-Control"] == "no-store"
    text = response.content.decode()
    assert text.startswith("\ufeff") == (file_format == "excel")
    if suffix == "ndjson":
        rows = [json.loads(line) for line in text.splitlines()]
    else:
        rows = [*csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))]
    assert list(rows[0]) == ["id", "name", "email", "created_at", "updated_at", "version"]
    expected = [id_ for (id_,) in stack.sql("SELECT id FROM users ORDER BY id")]
    assert [int(row["id"]) for row in rows] == expected


@pytest.fixture(scope="module")
def many(stack: Stack) -> Iterator[str]:
    """Rows for several parts of a download. Yield the domain of their addresses."""
    domain = "export.example.com"
    stack.sql("INSERT INTO users (name, email) SELECT 'E', n || %s FROM generate_series(1, 12000) n", f"@{domain}")
    yield domain
    stack.sql("DELETE FROM users WHERE email LIKE %s", f"%@{domain}")


def test_download_in_several_parts_repeats_and_loses_no_row(stack: Stack, many: str) -> None:
    lines = requests.get(address(stack), timeout=20).text.splitlines()
    assert sum(many in line for line in lines) == 12_000
    assert len(set(lines)) == len(lines)


def test_log_has_no_address_that_opens_a_download(stack: Stack) -> None:
    given = address(stack)
    request_id = requests.get(given, timeout=10).headers["X-Request-Id"]
    wait_until(lambda: request_id in stack.log("edge1"))
    assert given.split("/")[-2] not in stack.log("edge1") + stack.log("app1")


def test_address_of_a_download_cannot_be_made_up(stack: Stack) -> None:
    given = address(stack)
    ticket, name = given.split("/")[-2:]
    file_format, until, mac = ticket.split("-")
    for other in (f"{file_format}-{int(until) + 60}-{mac}", f"ndjson-{until}-{mac}", "nonsense"):
        check_problem(requests.get(given.replace(ticket, other), timeout=5), 404)
    check_problem(requests.get(given.replace(name, "users.ndjson"), timeout=5), 404)
    check_problem(requests.get(f"{stack.edge}/console/export?format=xlsx", timeout=5), 400, "format")


@pytest.mark.usefixtures("many")
def test_client_that_stalls_holds_no_connection_to_postgresql(stack: Stack) -> None:
    target = address(stack)
    host, port = target.split("/")[2].split(":")
    path = target.removeprefix(f"http://{host}:{port}")
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        assert client.recv(12) == b"HTTP/1.1 200"
        copies = "SELECT count(*) FROM pg_stat_activity WHERE state <> 'idle' AND query LIKE 'COPY%%'"
        wait_until(lambda: stack.sql(copies) == [(0,)])
        assert requests.get(f"{stack.edge}/users/1", timeout=5).status_code == 200


def test_download_of_a_search_has_its_rows_in_its_order(stack: Stack, many: str) -> None:
    """More rows than one part has, of which some have the same sort value."""
    orders = {"-id": "id DESC", "name": 'name COLLATE "und-x-icu", id', "-created_at": "created_at DESC, id DESC"}
    for sort, order in orders.items():
        response = requests.get(f"{address(stack)}?q={many}&sort={sort}", timeout=30)
        assert response.status_code == 200
        expected = [
            row_id for (row_id,) in stack.sql(f"SELECT id FROM users WHERE email LIKE %s ORDER BY {order}", f"%@{many}")
        ]
        assert len(expected) == 12_000
        assert [int(row["id"]) for row in csv.DictReader(io.StringIO(response.text))] == expected


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("file_format", ["csv", "excel", "ndjson"])
def test_order_changes_no_row_and_no_format(stack: Stack, file_format: str) -> None:
    all_by_id = requests.get(address(stack, file_format), timeout=30).content
    backwards = requests.get(f"{address(stack, file_format)}?sort=-id", timeout=30).content
    assert sorted(backwards.splitlines()) == sorted(all_by_id.splitlines())
    assert backwards.splitlines()[:1] == all_by_id.splitlines()[:1] or file_format == "ndjson"


def test_search_without_a_match_is_a_file_without_rows(stack: Stack) -> None:
    given = address(stack)
    assert (
        requests.get(f"{given}?q=nobodyhasthisname", timeout=10).text == "id,name,email,created_at,updated_at,version\n"
    )
    assert requests.get(f"{address(stack, 'ndjson')}?q=nobodyhasthisname", timeout=10).text == ""
    check_problem(requests.get(f"{given}?sort=nothing", timeout=5), 400, "sort")
    check_problem(requests.get(f"{given}?limit=5", timeout=5), 400, "limit")
