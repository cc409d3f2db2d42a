"""ETags, preconditions, methods and Accept (RFC 9110): a client receives no response that it has already, and a write
overwrites no change that its client has not seen."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime

import psycopg
import pytest
import requests

from testkit.api import User, check_problem
from testkit.raw_http import check_raw_problem, send_request
from testkit.stack import Stack, wait_until

JSON = b"Content-Type: application/json\r\n"
STRONG_ETAG = re.compile(r'"[!#-~]+"')


@pytest.fixture
def url(base_url: str, new_user: User) -> str:
    return f"{base_url}/users/{new_user['id']}"


def get(url: str, **headers: str) -> requests.Response:
    return requests.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()}, timeout=5)


class TestReads:
    @pytest.mark.parametrize(
        "path", ["/users", "/users/1", "/users/count", "/users?q=alice&sort=-name", "/users?limit=1"]
    )
    def test_every_app_and_edge_returns_the_same_strong_etag(self, stack: Stack, path: str) -> None:
        base_urls = (*stack.apps, *stack.edges, *stack.edges)
        etags = {get(base_url + path, Accept_Encoding="identity").headers["ETag"] for base_url in base_urls}
        assert len(etags) == 1
        assert STRONG_ETAG.fullmatch(etags.pop())

    @pytest.mark.parametrize("path", ["/users", "/users/1", "/users/count", "/users?limit=1"])
    def test_read_with_a_matching_etag_is_304_without_a_body(self, base_url: str, path: str) -> None:
        for _ in range(2):
            first = get(base_url + path)
            etag = first.headers["ETag"]
            for tags in (etag, f"W/{etag}", f'"other", {etag}', f'"other",W/{etag} , "x"', "*"):
                response = get(base_url + path, If_None_Match=tags)
                assert (response.status_code, response.content) == (304, b""), tags
                assert response.headers["ETag"] == etag
                assert response.headers["Cache-Control"] == "private, no-cache"
                assert response.headers.get("Link") == first.headers.get("Link")
                head = requests.head(base_url + path, headers={"If-None-Match": tags}, timeout=5)
                assert head.status_code == 304
            for tags in ('"other"', f'"{etag}"', etag.strip('"')[1:], 'W/"other"'):
                assert get(base_url + path, If_None_Match=tags).status_code == 200

    def test_read_with_an_etag_from_before_a_write_is_200(self, stack: Stack, base_url: str, url: str) -> None:
        etags = {path: get(base_url + path).headers["ETag"] for path in ("/users", url.removeprefix(base_url))}
        requests.patch(url, json={"name": "Anew"}, timeout=5)
        for edge in (base_url, *stack.edges):
            for path, etag in etags.items():
                assert get(edge + path, If_None_Match=etag).status_code == 200

    def test_reads_ignore_preconditions_with_dates(self, base_url: str, url: str) -> None:
        modified = get(url).headers["Last-Modified"]
        for header in ("If-Modified-Since", "If-Unmodified-Since"):
            for date in (modified, "Sun, 06 Nov 1994 08:49:37 GMT", "Fri, 31 Dec 9999 23:59:59 GMT", "yesterday"):
                for _ in range(2):
                    assert requests.get(url, headers={header: date}, timeout=5).status_code == 200

    def test_last_modified_is_the_time_of_the_last_change(self, url: str) -> None:
        requests.put(url, json={"name": "Changed"}, timeout=5)
        for _ in range(2):
            response = get(url)
            last_modified = parsedate_to_datetime(response.headers["Last-Modified"])
            assert last_modified == datetime.fromisoformat(response.json()["updated_at"]).replace(microsecond=0)

    def test_etag_of_a_page_changes_when_a_next_page_appears(self, base_url: str, new_user: User) -> None:
        """The body of the page stays the same; its Link header changes."""
        page = f"{base_url}/users?limit=1&q=tagged"
        created = [
            requests.post(f"{base_url}/users", json={"name": "Tagged", "email": "tagged1@example.com"}, timeout=5)
        ]
        alone = get(page)
        created.append(
            requests.post(f"{base_url}/users", json={"name": "Tagged", "email": "tagged2@example.com"}, timeout=5)
        )
        followed = get(page, If_None_Match=alone.headers["ETag"])
        for response in created:
            requests.delete(base_url + response.headers["Location"], timeout=5)
        assert followed.status_code == 200
        assert followed.content == alone.content
        assert "next" in followed.links and "next" not in alone.links

    def test_every_response_must_be_revalidated_by_clients(self, base_url: str, url: str) -> None:
        responses = [get(url), get(f"{base_url}/users"), get(f"{base_url}/users/0"), get(f"{base_url}/users?x=1")]
        responses += [requests.put(url, json={"name": "x"}, timeout=5), requests.put(url, json={}, timeout=5)]
        for response in responses:
            assert response.headers["Cache-Control"] == "private, no-cache"


Send = Callable[..., requests.Response]


def put(url: str, **headers: str) -> requests.Response:
    return send("PUT", url, headers)


def patch(url: str, **headers: str) -> requests.Response:
    return send("PATCH", url, headers)


def delete(url: str, **headers: str) -> requests.Response:
    return send("DELETE", url, headers)


def send(method: str, url: str, headers: dict[str, str]) -> requests.Response:
    body = None if method == "DELETE" else {"name": "Written"}
    sent_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.request(method, url, json=body, headers=sent_headers, timeout=5)


class TestWrites:
    def test_write_returns_the_etag_of_the_next_read(self, stack: Stack, base_url: str) -> None:
        created = requests.post(f"{base_url}/users", json={"name": "E", "email": "etags@example.com"}, timeout=5)
        url = base_url + created.headers["Location"]
        responses = [created]
        try:
            assert get(url).headers["ETag"] == created.headers["ETag"]
            for write in (put, patch):
                response = write(url)
                responses.append(response)
                for edge in (base_url, *stack.edges):
                    assert get(edge + created.headers["Location"]).headers["ETag"] == response.headers["ETag"]
            assert len({response.headers["ETag"] for response in responses}) == 3
        finally:
            delete(url)

    @pytest.mark.parametrize("write", [put, patch, delete])
    def test_write_whose_precondition_does_not_hold_is_412_and_changes_nothing(self, url: str, write: Send) -> None:
        stale = get(url).headers["ETag"]
        fresh = patch(url).headers["ETag"]
        for tags in (stale, f"W/{stale}", '"other"', f'{stale}, W/{stale}, "x"'):
            check_problem(write(url, If_Match=tags), 412)
        for tags in (fresh, f"W/{fresh}", "*", f'"other", {fresh}'):
            check_problem(write(url, If_None_Match=tags), 412)
        assert get(url).headers["ETag"] == fresh
        assert get(url).json()["version"] == 2

    @pytest.mark.parametrize("write", [put, patch, delete])
    @pytest.mark.parametrize("tags", ["{}", "W/{}", "*", '"other", {}', '{} , W/"x"', ",, {} ,"])
    def test_write_with_the_current_etag_in_if_match_is_carried_out(self, url: str, write: Send, tags: str) -> None:
        etag = get(url).headers["ETag"]
        assert write(url, If_Match=tags.format(etag)).status_code == 200

    @pytest.mark.parametrize("suffix", ["-gzip", "-br", "--gzip", ";gzip", "-zstd"])
    def test_etag_to_which_a_proxy_has_appended_an_encoding_names_the_same_content(self, url: str, suffix: str) -> None:
        stale = get(url).headers["ETag"]
        fresh = put(url, If_Match=f'{stale[:-1]}{suffix}"').headers["ETag"]
        check_problem(put(url, If_Match=f'{stale[:-1]}{suffix}"'), 412)
        check_problem(put(url, If_None_Match=f'W/{fresh[:-1]}{suffix}"'), 412)

    def test_412_names_the_cause_if_the_etag_is_not_of_this_service(self, url: str) -> None:
        for tags in ('"5f3a-61b2"', 'W/"x", "y-gzip"', '""', 'W/"", "-gzip"'):
            assert "a proxy" in check_problem(put(url, If_Match=tags), 412)
        stale = get(url).headers["ETag"]
        put(url)
        assert "Fetch it again" in check_problem(put(url, If_Match=stale), 412)

    @pytest.mark.parametrize("write", [put, patch, delete])
    def test_write_with_other_etags_in_if_none_match_is_carried_out(self, url: str, write: Send) -> None:
        assert write(url, If_None_Match='"other", W/"x", "", W/""').status_code == 200

    @pytest.mark.parametrize("write", [put, patch, delete])
    @pytest.mark.parametrize("condition", ["If_Match", "If_None_Match"])
    def test_missing_user_is_404_whatever_the_precondition(self, base_url: str, write: Send, condition: str) -> None:
        for tags in ('"x"', "*"):
            check_problem(write(f"{base_url}/users/999999999", **{condition: tags}), 404)

    def test_one_of_many_concurrent_writes_with_the_same_if_match_is_carried_out(
        self, stack: Stack, new_user: User
    ) -> None:
        etag = get(new_user["url"]).headers["ETag"]
        base_urls = [*stack.apps, *stack.edges]

        def change(number: int) -> int:
            url = f"{base_urls[number % 4]}/users/{new_user['id']}"
            return put(url, If_Match=etag).status_code

        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(change, range(16)))
        assert sorted(statuses) == [200] + [412] * 15
        assert get(new_user["url"]).json()["version"] == 2

    def test_one_of_many_writes_with_the_same_if_match_is_carried_out_after_the_row_was_deleted_and_inserted(
        self, stack: Stack, new_user: User
    ) -> None:
        """PostgreSQL locks row versions: a row that is deleted and inserted again has a lock of its own."""
        # A process admits two writes of one row.
        urls = [f"{app}/users/{new_user['id']}" for app in stack.apps[:2] for _ in range(2)]
        etag = get(urls[0]).headers["ETag"]
        with psycopg.connect(stack.postgres) as outside, ThreadPoolExecutor(4) as pool:
            outside.execute("SET LOCAL velikiy.history = off")  # the row keeps its version, and so its ETag
            outside.execute(
                "CREATE TEMPORARY TABLE kept ON COMMIT DROP AS SELECT * FROM users WHERE id = %s", (new_user["id"],)
            )
            outside.execute("DELETE FROM users WHERE id = %s", (new_user["id"],))
            outside.execute(
                "INSERT INTO users (id, name, email, created_at, updated_at, version)"
                " SELECT id, name, email, created_at, updated_at, version FROM kept"
            )
            writes = [pool.submit(put, url, If_Match=etag) for url in urls]
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%FOR UPDATE'"
            )
            wait_until(lambda: stack.sql(waiting) == [(4,)])
            outside.commit()
            statuses = sorted(write.result().status_code for write in writes)
        assert statuses == [200, 412, 412, 412]

    def test_writes_can_follow_one_another_with_the_etags_that_they_return(self, url: str) -> None:
        etag = get(url).headers["ETag"]
        for write in (put, patch, put, patch):
            response = write(url, If_Match=etag)
            assert response.status_code == 200
            etag = response.headers["ETag"]
        assert delete(url, If_Match=etag).status_code == 200


class TestPatch:
    @pytest.mark.parametrize(
        "content_type", ["application/json", "application/merge-patch+json", "Application/JSON; charset=UTF-8"]
    )
    def test_patch_changes_only_the_fields_that_it_contains(self, url: str, new_user: User, content_type: str) -> None:
        response = requests.patch(url, data='{"name": "Patched"}', headers={"Content-Type": content_type}, timeout=5)
        assert (response.status_code, response.json()) == (200, {"message": "Updated"})
        user = get(url).json()
        assert (user["name"], user["email"], user["version"]) == ("Patched", new_user["email"], 2)

    def test_patch_with_null_for_a_required_field_is_422(self, url: str) -> None:
        check_problem(requests.patch(url, json={"name": None}, timeout=5), 422, "name")

    def test_unsupported_patch_type_is_415_and_accept_patch_lists_the_supported_types(self, url: str) -> None:
        response = requests.patch(url, data="[]", headers={"Content-Type": "application/json-patch+json"}, timeout=5)
        check_problem(response, 415)
        assert response.headers["Accept-Patch"] == "application/json, application/merge-patch+json"


ACCEPTED_BY_THE_EDGE = [
    "*/*",  # curl, requests, fetch, Ruby
    "application/json, text/plain, */*",  # axios
    "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",  # Java's HttpURLConnection
    "text/html, image/gif, image/jpeg, */*; q=0.2",
    "application/json, application/*+json",  # Spring
    "application/json; charset=utf-8",
    "application/json, text/javascript, */*; q=0.01",  # jQuery
    "application/json, */*;q=0.5",  # HTTPie
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
    "APPLICATION/JSON",
    "Application/*",
    "application/problem+json",
    "*",
    "*/*; q=.2",
    "application/json;q=0.9, */*;q=0.1",
    "application/json;q=0.001",
    "application/json;q=.001;level=1",
    "application/json;version=2",
    "application/json;q=",
    "application/json;q=x",
    "application/json;q=-0",
    "application/json;q=0.0.0",
    "application/json;q=1.5",
    ",, application/json ,",
    "text/html;application/xml,\tapplication/json\t;\tq=1",
]
"""Values of Accept that allow JSON, as the edge itself can tell: it responds from its cache."""

ACCEPTED_BY_AN_APP = [
    ",",
    ", ;q=0 ,",
    "text/html;q=0, */*",
    "*/*;q=0, application/json",
    "application/*;q=0, application/json;q=0.5",
    "application/*;q=0, application/problem+json",
    "application/json, application/problem+json;q=0",
    "application/json;version=2;q=0, application/json",
    'application/json;q="0"',
    'application/json;profile="a, b;q=0"',
    'text/html;a=",;q=0,", application/json',
    'text/html;a="\\"", application/json',
    'application/json; charset="utf-8"',
    "*/json",
    "text/html\r\nAccept: application/json",
    "text/html;q=0.5\r\nAccept: text/plain\r\naccept: */*;q=.1",
]
"""Values of Accept that allow JSON, as only an app can tell."""

NOT_ACCEPTED = [
    "text/html",
    "text/*, image/*",
    "application/xml",
    "application/jsonx",
    "application/ld+json",
    "application / json",
    "application/json/x",
    "application",
    "json",
    "/",
    "text/html;application/json",
    "application/json;q=0",
    "APPLICATION/JSON ; Q = 0.",
    "application/json;q=0, */*",
    "application/json;q=0.000, application/problem+json",
    "application/json;level=1;q=.0;level=2, application/*",
    "application/*;q=0, */*",
    "*/*;q=00.00",
    "*;q=0",
    'text/html;a="application/json, */*"',
    'text/html;a="\\", application/json"',
    'text/html;a=", */*',
]


class TestAccept:
    @pytest.mark.parametrize("accept", ACCEPTED_BY_THE_EDGE)
    def test_usual_accept_header_that_allows_json_is_served_from_the_cache(
        self, stack: Stack, base_url: str, accept: str
    ) -> None:
        def is_hit() -> bool:
            response = send_request(base_url, "GET", "/users/1", f"Accept: {accept}\r\n".encode())
            assert response.status == 200
            return base_url == stack.app or response.headers["x-cache-status"] == "HIT"

        wait_until(is_hit)

    @pytest.mark.parametrize("accept", ACCEPTED_BY_AN_APP)
    def test_unusual_accept_header_that_allows_json_is_served_by_an_app(
        self, stack: Stack, base_url: str, accept: str
    ) -> None:
        response = send_request(base_url, "GET", "/users/1", f"Accept: {accept}\r\n".encode())
        assert response.status == 200
        assert base_url == stack.app or response.headers["x-cache-status"] == "BYPASS"

    @pytest.mark.parametrize("accept", [*ACCEPTED_BY_THE_EDGE, *ACCEPTED_BY_AN_APP])
    def test_write_with_an_accept_header_that_allows_json_is_carried_out(self, base_url: str, accept: str) -> None:
        response = send_request(base_url, "DELETE", "/users/999999999", f"Accept: {accept}\r\n".encode())
        check_raw_problem(response, 404)

    @pytest.mark.parametrize("accept", [*NOT_ACCEPTED, "text/html\r\nAccept: text/plain"])
    def test_write_with_an_accept_header_that_does_not_allow_json_is_406(self, base_url: str, accept: str) -> None:
        response = send_request(base_url, "DELETE", "/users/999999999", f"Accept: {accept}\r\n".encode())
        check_raw_problem(response, 406)

    @pytest.mark.parametrize("accept", NOT_ACCEPTED)
    def test_accept_header_that_does_not_allow_json_is_406(self, base_url: str, accept: str) -> None:
        for _ in range(2):
            response = send_request(base_url, "GET", "/users/1", f"Accept: {accept}\r\n".encode())
            check_raw_problem(response, 406)
            assert response.headers.get("x-cache-status") in (None, "BYPASS")


METHODS = {
    "/users": {"GET", "HEAD", "OPTIONS", "POST"},
    "/users/count": {"GET", "HEAD", "OPTIONS"},
    "/users/1": {"GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"},
    "/users/batch": {"OPTIONS", "POST"},
}


class TestMethods:
    @pytest.mark.parametrize("path", METHODS)
    def test_options_lists_the_methods_of_an_address(self, base_url: str, path: str) -> None:
        response = requests.options(base_url + path, timeout=5)
        assert (response.status_code, response.content) == (204, b"")
        assert set(re.split(r",\s*", response.headers["Allow"])) == METHODS[path]
        assert ("Accept-Patch" in response.headers) == ("PATCH" in METHODS[path])

    @pytest.mark.parametrize("path", METHODS)
    def test_unsupported_method_is_405_and_allow_lists_the_supported_methods(self, base_url: str, path: str) -> None:
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - METHODS[path]:
            response = send_request(base_url, method, path, JSON, b"{}" if method[0] == "P" else b"")
            check_raw_problem(response, 405)
            assert set(re.split(r",\s*", response.headers["allow"])) == METHODS[path]

    @pytest.mark.parametrize("path", METHODS)
    @pytest.mark.parametrize("method", ["QUERY", "PROPFIND", "FOO", "M-SEARCH"])
    def test_unknown_method_is_405_and_allow_lists_the_supported_methods(
        self, base_url: str, method: str, path: str
    ) -> None:
        for body in (b"", b"{}"):
            response = send_request(base_url, method, path, JSON, body)
            check_raw_problem(response, 405)
            assert set(re.split(r",\s*", response.headers["allow"])) == METHODS[path]

    @pytest.mark.parametrize("method", ["TRACE", "CONNECT"])
    def test_method_that_a_server_refuses_by_itself_is_a_problem(self, base_url: str, method: str) -> None:
        response = send_request(base_url, method, "/users")
        assert response.status in (400, 405, 501)
        check_raw_problem(response, response.status)

    @pytest.mark.parametrize(
        "path", ["/users", "/users/1", "/users/count", "/users?limit=1&sort=-name", "/users/0", "/users?x=1"]
    )
    def test_head_returns_the_status_and_headers_of_get_without_a_body(self, base_url: str, path: str) -> None:
        for _ in range(2):
            get_, head = send_request(base_url, "GET", path), send_request(base_url, "HEAD", path)
            assert (head.status, head.body) == (get_.status, b"")
            for name in ("content-type", "content-length", "etag", "last-modified", "link", "cache-control"):
                assert head.headers.get(name) == get_.headers.get(name), name
