"""Problems: each has the form of RFC 9457, a type with a page, and the id of its request."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
import pytest
import requests

from testkit.raw_http import check_raw_problem, send_request
from testkit.stack import ROOT, Stack, wait_until
from velikiy.resources.problems import KINDS

JSON = b"Content-Type: application/json\r\n"


def test_every_problem_type_has_a_page(base_url: str) -> None:
    listed = requests.get(f"{base_url}/problems/", timeout=5)
    assert listed.status_code == 200
    for name, kind in KINDS.items():
        assert f'href="/problems/{name}"' in listed.text
        page = requests.get(f"{base_url}/problems/{name}", timeout=5)
        assert page.status_code == 200
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert f"{kind.status} {kind.title}" in page.text


@pytest.mark.parametrize("name", ["", "none", "Taken", "taken/", "taken/x", "<b>", "%74aken", "taken%00"])
def test_unknown_problem_type_has_no_page(base_url: str, name: str) -> None:
    response = send_request(base_url, "GET", f"/problems/{name}")
    if name:
        assert response.status in (400, 404)
        check_raw_problem(response, response.status)
    else:
        assert response.status == 200


def test_edge_and_app_agree_on_the_status_and_title_of_each_problem_type() -> None:
    config = (ROOT / "edge/conf/generated/problems.conf").read_text()
    types = re.findall(r'(\d{3}) \'"type":"\$path_prefix/problems/([a-z-]+)","title":"([^"]+)"\'', config)
    assert len(types) > 10
    for status, name, title in types:
        assert (KINDS[name].status, KINDS[name].title) == (int(status), title)


def test_every_error_status_that_nginx_can_send_by_itself_is_a_problem() -> None:
    """The list includes statuses that no configuration makes Nginx send so far, such as the 429 of a limit."""
    config = (ROOT / "edge/conf/generated/errors_and_batches.conf").read_text()
    # 500 becomes another status first, where a balancer ended the request (edge/conf/failed.conf).
    [listed] = re.findall(r"error_page ([0-9 ]{20,}) /\.problem;\nerror_page 500 @failed;", config)
    statuses = {*map(int, listed.split()), 500}
    assert statuses == {400, 401, 403, 404, 405, 408, 411, 412, 413, 414, 416, 417, 421, 429, *range(500, 506)}


@pytest.mark.parametrize(
    ("method", "target", "headers", "body", "status", "kind"),
    [
        ("GET", "/users?x=1", b"", b"", 400, "bad-request"),
        ("POST", "/users", JSON, b"{", 400, "not-json"),
        ("GET", "/users/0", b"", b"", 404, "not-found"),
        ("GET", "/users/999999999", b"", b"", 404, "not-found"),
        ("GET", "/nothing", b"", b"", 404, "not-found"),
        ("PUT", "/users", JSON, b"{}", 405, "method-not-allowed"),
        ("GET", "/users", b"Accept: text/html\r\n", b"", 406, "not-acceptable"),
        ("POST", "/users", JSON, b'{"name": "A", "email": "alice@example.com"}', 409, "taken"),
        ("POST", "/users/batch", JSON, b'{"operations": [{"op": "delete", "id": 999999999}]}', 409, "batch-refused"),
        ("PUT", "/users/1", JSON + b'If-Match: "x"\r\n', b'{"name": "A"}', 412, "precondition-failed"),
        ("POST", "/users", JSON, b" " * 70_000, 413, "content-too-large"),
        ("POST", "/users", b"Content-Type: text/plain\r\n", b"{}", 415, "unsupported-media-type"),
        ("POST", "/users", JSON, b"{}", 422, "invalid"),
    ],
)
def test_each_error_has_its_problem_type(
    base_url: str, method: str, target: str, headers: bytes, body: bytes, status: int, kind: str
) -> None:
    for _ in range(2):
        response = send_request(base_url, method, target, headers, body)
        check_raw_problem(response, status)
        assert response.json["type"] == f"/problems/{kind}"
        assert response.json["title"] == KINDS[kind].title
        assert response.json["request_id"] in response.headers["x-request-id"]


def test_missing_right_or_column_is_500_and_logged_without_the_values_of_the_row(own_stack: Stack) -> None:
    put = partial(send_request, own_stack.edge, "PUT", "/users/1", JSON, b'{"name": "A"}')
    own_stack.sql("REVOKE UPDATE ON users FROM velikiy")
    for _ in range(20):  # more than a process has connections
        response = put()
        check_raw_problem(response, 500)
        assert "denies the service access" in response.json["detail"]
        assert send_request(own_stack.app, "GET", "/users/1").status == 200
    own_stack.sql("GRANT UPDATE ON users TO velikiy")
    assert put().status == 200
    own_stack.sql("ALTER TABLE users RENAME COLUMN email TO mail")
    new = b'{"name": "A", "email": "a@example.com"}'
    for base_url in (own_stack.app, own_stack.edge):
        for method, target in (("GET", "/users/1"), ("GET", "/users"), ("POST", "/users"), ("PUT", "/users/1")):
            send = partial(send_request, base_url, method, target, JSON, new if method[0] == "P" else b"")
            # Until the relay notices the change of the table, Redis may have the row.
            response = wait_until(lambda send=send: (it := send()).status == 500 and it)  # type: ignore[misc]
            check_raw_problem(response, 500)
            assert response.json["type"] == "/problems/internal-error"
            assert "retry-after" not in response.headers

    def log_with_last_request() -> str:  # an app writes its lines in groups, a moment after the response
        log = own_stack.log("app1") + own_stack.log("app2")
        return log if response.json["request_id"] in log else ""

    log = wait_until(log_with_last_request)
    assert '"sqlstate":"42703"' in log.replace(" ", "")
    assert "email" in log  # the message names the column, and quotes no value
    assert re.search(r'"statement":"velikiy/resources/repository\.py:\d+ _write"', log.replace('": "', '":"'))
    assert "a@example.com" not in log
    assert "postgres.unavailable" not in log


def test_detail_for_a_cancelled_write_says_that_the_database_cancelled_it(
    stack: Stack, base_url: str, new_user: dict[str, str]
) -> None:
    target, waiting = f"/users/{new_user['id']}", "wait_event_type = 'Lock' AND application_name = 'velikiy writes'"
    with psycopg.connect(stack.postgres) as outside, ThreadPoolExecutor(1) as pool:
        outside.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (new_user["id"],))
        response = pool.submit(send_request, base_url, "PUT", target, JSON, b'{"name": "A"}')
        wait_until(lambda: stack.sql(f"SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE {waiting}"))
        check_raw_problem(response.result(), 503)
    detail = response.result().json["detail"]
    assert detail.startswith("The database cancelled the request: ")
    assert "The request was not carried out" in detail
    assert response.result().headers["retry-after"] == "1"


def test_each_request_has_its_own_request_id(base_url: str) -> None:
    ids = {send_request(base_url, "GET", "/users/999999999").json["request_id"] for _ in range(5)}
    assert len(ids) == 5


def test_app_adopts_the_request_id_that_it_receives(stack: Stack) -> None:
    response = send_request(stack.app, "GET", "/users/999999999", b"X-Request-Id: given-by-hand\r\n")
    assert response.json["request_id"] == response.headers["x-request-id"] == "given-by-hand"


def test_problem_that_repeats_a_part_of_the_request_is_not_sniffed_as_html(base_url: str) -> None:
    response = send_request(base_url, "GET", "/users?%3Cscript%3E=1")
    check_raw_problem(response, 400, "<script>")
    assert response.headers["x-content-type-options"] == "nosniff"
