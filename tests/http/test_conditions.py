"""ETags, conditions, methods and Accept (RFC 9110): nothing is sent twice, and no write overwrites what its writer has
not seen."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime

import psycopg
import pytest
import requests

from testkit.api import User, check_problem
from testkit.raw_http import ask, check
from testkit.stack import Stack, wait_until

JSON = b"Content-Type: application/json\r\n"
STRONG = re.compile(r'"[!#-~]+"')


@pytest.fixture
def url(base_url: str, new_user: User) -> str:
    return f"{base_url}/users/{new_user['id']}"


def get(url: str, **headers: str) -> requests.Response:
    return requests.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()}, timeout=5)


class TestReads:
    @pytest.mark.parametrize(
        "path", ["/users", "/users/1", "/users/count", "/users?q=alice&sort=-name", "/users?limit=1"]
    )
    def test_every_read_has_a_strong_etag_that_all_doors_share(self, stack: Stack, path: str) -> None:
        etags = {get(base_url + path).headers["ETag"] for base_url in (*stack.apps, *stack.edges, *stack.edges)}
        assert len(etags) == 1
        assert STRONG.fullmatch(etags.pop())

    @pytest.mark.parametrize("path", ["/users", "/users/1", "/users/count", "/users?limit=1"])
    def test_who_has_it_gets_304_without_a_body(self, base_url: str, path: str) -> None:
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

    def test_after_a_write_it_is_sent_anew(self, stack: Stack, base_url: str, url: str) -> None:
        etags = {path: get(base_url + path).headers["ETag"] for path in ("/users", url.removeprefix(base_url))}
        requests.patch(url, json={"name": "Anew"}, timeout=5)
        for edge in (base_url, *stack.edges):
            for path, etag in etags.items():
                assert get(edge + path, If_None_Match=etag).status_code == 200

    def test_dates_of_whole_seconds_decide_nothing(self, base_url: str, url: str) -> None:
        modified = get(url).headers["Last-Modified"]
        for header in ("If-Modified-Since", "If-Unmodified-Since"):
            for date in (modified, "Sun, 06 Nov 1994 08:49:37 GMT", "Fri, 31 Dec 9999 23:59:59 GMT", "yesterday"):
                for _ in range(2):
                    assert requests.get(url, headers={header: date}, timeout=5).status_code == 200

    def test_last_modified_is_when_the_user_was_changed(self, url: str) -> None:
        requests.put(url, json={"name": "Changed"}, timeout=5)
        for _ in range(2):
            response = get(url)
            said = parsedate_to_datetime(response.headers["Last-Modified"])
            assert said == datetime.fromisoformat(response.json()["updated_at"]).replace(microsecond=0)

    def test_a_page_that_has_become_followed_by_another_has_another_etag(self, base_url: str, new_user: User) -> None:
        """Its body is the same, its Link is not."""
        page = f"{base_url}/users?limit=1&q=tagged"
        made = [requests.post(f"{base_url}/users", json={"name": "Tagged", "email": "tagged1@example.com"}, timeout=5)]
        alone = get(page)
        made.append(
            requests.post(f"{base_url}/users", json={"name": "Tagged", "email": "tagged2@example.com"}, timeout=5)
        )
        followed = get(page, If_None_Match=alone.headers["ETag"])
        for response in made:
            requests.delete(base_url + response.headers["Location"], timeout=5)
        assert followed.status_code == 200
        assert followed.content == alone.content
        assert "next" in followed.links and "next" not in alone.links

    def test_no_answer_may_be_used_again_unasked(self, base_url: str, url: str) -> None:
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
    spelled = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.request(method, url, json=body, headers=spelled, timeout=5)


class TestWrites:
    def test_they_answer_with_the_etag_that_the_next_reader_gets(self, stack: Stack, base_url: str) -> None:
        made = requests.post(f"{base_url}/users", json={"name": "E", "email": "etags@example.com"}, timeout=5)
        url = base_url + made.headers["Location"]
        responses = [made]
        try:
            assert get(url).headers["ETag"] == made.headers["ETag"]
            for write in (put, patch):
                response = write(url)
                responses.append(response)
                for edge in (base_url, *stack.edges):
                    assert get(edge + made.headers["Location"]).headers["ETag"] == response.headers["ETag"]
            assert len({response.headers["ETag"] for response in responses}) == 3
        finally:
            delete(url)

    @pytest.mark.parametrize("write", [put, patch, delete])
    def test_what_was_changed_since_is_not_overwritten(self, url: str, write: Send) -> None:
        stale = get(url).headers["ETag"]
        fresh = patch(url).headers["ETag"]
        for tags in (stale, f"W/{fresh}", '"other"', f'{stale}, W/{fresh}, "x"'):
            check_problem(write(url, If_Match=tags), 412)
        for tags in (fresh, f"W/{fresh}", "*", f'"other", {fresh}'):
            check_problem(write(url, If_None_Match=tags), 412)
        assert get(url).headers["ETag"] == fresh
        assert get(url).json()["version"] == 2

    @pytest.mark.parametrize("write", [put, patch, delete])
    @pytest.mark.parametrize("tags", ["{}", "*", '"other", {}', '{} , W/"x"', ",, {} ,"])
    def test_what_is_as_the_writer_has_read_it_is_written(self, url: str, write: Send, tags: str) -> None:
        etag = get(url).headers["ETag"]
        assert write(url, If_Match=tags.format(etag)).status_code == 200

    @pytest.mark.parametrize("write", [put, patch, delete])
    def test_what_is_another_one_than_named_is_written(self, url: str, write: Send) -> None:
        assert write(url, If_None_Match='"other", W/"x"').status_code == 200

    @pytest.mark.parametrize("write", [put, patch, delete])
    @pytest.mark.parametrize("condition", ["If_Match", "If_None_Match"])
    def test_who_is_not_there_is_404_whatever_the_condition(self, base_url: str, write: Send, condition: str) -> None:
        for tags in ('"x"', "*"):
            check_problem(write(f"{base_url}/users/999999999", **{condition: tags}), 404)

    def test_of_many_who_have_read_the_same_one_writes(self, stack: Stack, new_user: User) -> None:
        etag = get(new_user["url"]).headers["ETag"]
        base_urls = [*stack.apps, *stack.edges]

        def change(number: int) -> int:
            url = f"{base_urls[number % 4]}/users/{new_user['id']}"
            return put(url, If_Match=etag).status_code

        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(change, range(16)))
        assert sorted(statuses) == [200] + [412] * 15
        assert get(new_user["url"]).json()["version"] == 2

    def test_one_writes_even_if_somebody_deletes_and_inserts_the_row_meanwhile(
        self, stack: Stack, new_user: User
    ) -> None:
        """A row that is inserted anew is another one to PostgreSQL's locks."""
        url = f"{stack.app}/users/{new_user['id']}"
        etag = get(url).headers["ETag"]
        with psycopg.connect(stack.postgres) as outside, ThreadPoolExecutor(4) as pool:
            outside.execute(
                "CREATE TEMPORARY TABLE kept ON COMMIT DROP AS SELECT * FROM users WHERE id = %s", (new_user["id"],)
            )
            outside.execute("DELETE FROM users WHERE id = %s", (new_user["id"],))
            outside.execute(
                "INSERT INTO users (id, name, email, created_at, updated_at, version)"
                " SELECT id, name, email, created_at, updated_at, version FROM kept"
            )
            writing = [pool.submit(put, url, If_Match=etag) for _ in range(4)]
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%FOR UPDATE'"
            )
            wait_until(lambda: stack.sql(waiting) == [(4,)])
            outside.commit()
            statuses = sorted(response.result().status_code for response in writing)
        assert statuses == [200, 412, 412, 412]

    def test_a_chain_of_etags_needs_no_reads(self, url: str) -> None:
        etag = get(url).headers["ETag"]
        for write in (put, patch, put, patch):
            response = write(url, If_Match=etag)
            assert response.status_code == 200
            etag = response.headers["ETag"]
        assert delete(url, If_Match=etag).status_code == 200


class TestPatch:
    @pytest.mark.parametrize(
        "kind", ["application/json", "application/merge-patch+json", "Application/JSON; charset=UTF-8"]
    )
    def test_it_changes_what_it_names(self, url: str, new_user: User, kind: str) -> None:
        response = requests.patch(url, data='{"name": "Patched"}', headers={"Content-Type": kind}, timeout=5)
        assert (response.status_code, response.json()) == (200, {"message": "Updated"})
        user = get(url).json()
        assert (user["name"], user["email"], user["version"]) == ("Patched", new_user["email"], 2)

    def test_null_takes_nothing_away_that_has_to_be_there(self, url: str) -> None:
        check_problem(requests.patch(url, json={"name": None}, timeout=5), 422, "name")

    def test_it_says_what_it_takes(self, url: str) -> None:
        response = requests.patch(url, data="[]", headers={"Content-Type": "application/json-patch+json"}, timeout=5)
        check_problem(response, 415)
        assert response.headers["Accept-Patch"] == "application/json, application/merge-patch+json"


PLAINLY = [
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
"""The edge sees by itself that JSON will do for these."""

AFTER_ALL = [
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
]

NOT_AT_ALL = [
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
    @pytest.mark.parametrize("accept", PLAINLY)
    def test_a_client_that_plainly_takes_json_gets_it_from_the_cache(
        self, stack: Stack, base_url: str, accept: str
    ) -> None:
        def answered() -> bool:
            response = ask(base_url, "GET", "/users/1", f"Accept: {accept}\r\n".encode())
            assert response.status == 200
            return base_url == stack.app or response.headers["x-cache-status"] == "HIT"

        wait_until(answered)

    @pytest.mark.parametrize("accept", AFTER_ALL)
    def test_a_client_that_takes_json_after_all_gets_it_from_an_app(
        self, stack: Stack, base_url: str, accept: str
    ) -> None:
        response = ask(base_url, "GET", "/users/1", f"Accept: {accept}\r\n".encode())
        assert response.status == 200
        assert base_url == stack.app or response.headers["x-cache-status"] == "BYPASS"

    @pytest.mark.parametrize("accept", NOT_AT_ALL)
    def test_a_client_that_takes_no_json_gets_406(self, base_url: str, accept: str) -> None:
        for _ in range(2):
            response = ask(base_url, "GET", "/users/1", f"Accept: {accept}\r\n".encode())
            check(response, 406)
            assert response.headers.get("x-cache-status") in (None, "BYPASS")


METHODS = {
    "/users": {"GET", "HEAD", "OPTIONS", "POST"},
    "/users/count": {"GET", "HEAD", "OPTIONS"},
    "/users/1": {"GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"},
    "/users/batch": {"OPTIONS", "POST"},
}


class TestMethods:
    @pytest.mark.parametrize("path", METHODS)
    def test_options_names_them(self, base_url: str, path: str) -> None:
        response = requests.options(base_url + path, timeout=5)
        assert (response.status_code, response.content) == (204, b"")
        assert set(re.split(r",\s*", response.headers["Allow"])) == METHODS[path]
        assert ("Accept-Patch" in response.headers) == ("PATCH" in METHODS[path])

    @pytest.mark.parametrize("path", METHODS)
    def test_others_are_405_and_name_those_that_are(self, base_url: str, path: str) -> None:
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - METHODS[path]:
            response = ask(base_url, method, path, JSON, b"{}" if method[0] == "P" else b"")
            check(response, 405)
            assert set(re.split(r",\s*", response.headers["allow"])) == METHODS[path]

    @pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "FOO"])
    def test_what_nobody_knows_is_405_or_501(self, base_url: str, method: str) -> None:
        response = ask(base_url, method, "/users")
        assert response.status in (400, 405, 501)
        check(response, response.status)

    @pytest.mark.parametrize(
        "path", ["/users", "/users/1", "/users/count", "/users?limit=1&sort=-name", "/users/0", "/users?x=1"]
    )
    def test_head_is_get_without_a_body(self, base_url: str, path: str) -> None:
        for _ in range(2):
            get_, head = ask(base_url, "GET", path), ask(base_url, "HEAD", path)
            assert (head.status, head.body) == (get_.status, b"")
            for name in ("content-type", "content-length", "etag", "last-modified", "link", "cache-control"):
                assert head.headers.get(name) == get_.headers.get(name), name
