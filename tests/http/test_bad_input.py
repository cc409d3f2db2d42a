"""Invalid input in every place of a request where a client could send it. The response is a 4xx problem that names the
field and the reason, and never a 5xx. NoResponse is stored, and nothing is cached."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
import requests

from testkit.raw_http import NoResponse, RawResponse, check_raw_problem, parse_response, send_bytes, send_request
from testkit.stack import Stack, wait_until
from velikiy.findings.caches import NO_ROW

JSON = b"Content-Type: application/json\r\n"
NEW_USER_BODY = b'{"name": "Spoilt", "email": "spoilt@example.com"}'
"""A valid body: only the part that a test adds makes its request invalid."""

DIGITS_5000 = "9" * 5000

INVALID_JSON_BODIES = {
    "nothing": b"",
    "a word": b"nope",
    "an open brace": b"{",
    "a form": b"name=A&email=a@b.co",
    "NaN": b'{"name": NaN, "email": "a@b.co"}',
    "Infinity": b'{"name": Infinity, "email": "a@b.co"}',
    "minus Infinity": b'{"name": -Infinity, "email": "a@b.co"}',
    "5,000 digits": b'{"name": %b, "email": "a@b.co"}' % DIGITS_5000.encode(),
    "a leading zero": b'{"name": 01, "email": "a@b.co"}',
    "a plus": b'{"name": +1, "email": "a@b.co"}',
    "a BOM": b'\xef\xbb\xbf{"name": "A", "email": "a@b.co"}',
    "invalid UTF-8": b'{"name": "\xff", "email": "a@b.co"}',
    "an encoded surrogate": b'{"name": "\xed\xa0\x80", "email": "a@b.co"}',
    "an overlong form of UTF-8": b'{"name": "\xc0\xaf", "email": "a@b.co"}',
    "UTF-16": '{"name": "A", "email": "a@b.co"}'.encode("utf-16"),
    "UTF-32": '{"name": "A", "email": "a@b.co"}'.encode("utf-32"),
    "half a surrogate pair": b'{"name": "\\ud800", "email": "a@b.co"}',
    "the other half of a surrogate pair": b'{"name": "\\udc00x", "email": "a@b.co"}',
    "a surrogate pair in reverse order": b'{"name": "\\udc00\\ud800", "email": "a@b.co"}',
    "half a surrogate pair in a key": b'{"\\ud800": 1, "name": "A", "email": "a@b.co"}',
    "a key twice": b'{"name": "A", "name": "B", "email": "a@b.co"}',
    "a key twice, once escaped": b'{"name": "A", "n\\u0061me": "B", "email": "a@b.co"}',
    "an unknown key twice": b'{"x": 1, "x": 1, "name": "A", "email": "a@b.co"}',
    "a key twice, deep inside": b'{"name": {"a": {"b": 1, "b": 2}}, "email": "a@b.co"}',
    "1,000 deep": b'{"name": %b%b, "email": "a@b.co"}' % (b"[" * 1000, b"]" * 1000),
    "1,000 objects deep": b'{"name": %b1%b}' % (b'{"a":' * 1000, b"}" * 1000),
    "5,000 deep": b"[" * 5000 + b"]" * 5000,
    "30,000 deep and open": b"[" * 30_000,
    "a raw line feed": b'{"name": "a\nb", "email": "a@b.co"}',
    "a raw NUL": b'{"name": "a\x00b", "email": "a@b.co"}',
    "a NUL after the object": b'{"name": "A", "email": "a@b.co"}\x00',
    "text after the object": b'{"name": "A", "email": "a@b.co"} x',
    "two objects": b'{"name": "A", "email": "a@b.co"}{"name": "A", "email": "a@b.co"}',
    "a trailing comma": b'{"name": "A", "email": "a@b.co",}',
    "a comment": b'{"name": "A", /* */ "email": "a@b.co"}',
    "single quotes": b"{'name': 'A', 'email': 'a@b.co'}",
    "an unknown escape": b'{"name": "\\x41", "email": "a@b.co"}',
    "a cut-off escape": b'{"name": "\\u00',
    "XML": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>',
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
}

NON_OBJECT_BODIES = {"null": b"null", "true": b"true", "0": b"0", "a string": b'"x"', "[]": b"[]", "[{}]": b"[{}]"}

NON_STRINGS = {
    "null": "null",
    "true": "true",
    "7": "7",
    "1e999": "1e999",
    "-0.0": "-0.0",
    "4,000 digits": "9" * 4000,
    "[]": "[]",
    "a list": '["a"]',
    "{}": "{}",
    "an operator": '{"$ne": null}',
}
"""JSON values for a field whose value has to be a string."""

INVALID_LINES = {
    "empty": '""',
    "blank": '"  \\t "',
    "blank beyond ASCII": '"\\u00a0\\u3000"',
    "NUL": '"a\\u0000b"',
    "a line feed": '"a\\nb"',
    "a carriage return and a header": '"a\\r\\nX-Evil: 1"',
    "escape": '"\\u001b[31mred"',
    "DEL": '"a\\u007fb"',
    "C1": '"a\\u009bb"',
    "line separator": '"a\\u2028b"',
    "paragraph separator": '"a\\u2029b"',
}

INVALID_NAMES = {
    "101 characters": json.dumps("x" * 101),
    "60,000 characters": json.dumps("x" * 60_000),
    "invisible characters": '"\\u200b\\u200d"',
}

INVALID_EMAILS = {
    "a word": '"plain"',
    "no domain": '"a@"',
    "no mailbox": '"@b.co"',
    "two @": '"a@b@c.de"',
    "a space": '"a b@c.de"',
    "no dot": '"a@b"',
    "two dots": '"a@b..co"',
    "a dot first": '".a@b.co"',
    "a hyphen first": '"a@-b.co"',
    "an IP address": '"a@[127.0.0.1]"',
    "quotes": '"\\"a b\\"@c.de"',
    "a name before it": '"Alice <a@b.co>"',
    "HTML": '"<script>alert(1)</script>@b.co"',
    "SQL": '"\') OR 1=1; DROP TABLE users; --@b.co"',
    "a list": '"a@b.co,c@d.co"',
    "a header": '"a@b.co\\r\\nBcc: c@d.co"',
    "65 in the mailbox": json.dumps("x" * 65 + "@b.co"),
    "over-long": json.dumps("x" * 60 + "@" + "b" * 60 + "." + "c" * 60 + "." + "d" * 60 + "." + "e" * 60 + ".de"),
    "an over-long label": json.dumps(f"a@{'b' * 60}.{'c' * 250}.de"),
    "60,000 characters": json.dumps("x" * 60_000 + "@b.co"),
    "a Cyrillic a": '"p\\u0430ypal@example.com"',
    "a Cyrillic a in the domain": '"x@p\\u0430ypal.com"',
    "Greek in Latin": '"\\u03bfmega@example.com"',
    "a direction mark": '"a\\u202eb@c.de"',
    "invisible characters": '"a\\u200b@c.de"',
    "invalid Punycode": '"a@xn--0.com"',
}

INVALID_IDS = {
    "zero": "0",
    "negative": "-1",
    "minus zero": "-0",
    "a fraction": "1.5",
    "1e999": "1e999",
    "2^63": str(2**63),
    "10^30": "1" + "0" * 30,
    "4,000 digits": "9" * 4000,
    "a string": '"1"',
    "true": "true",
    "null": "null",
    "a list": "[1]",
    "{}": "{}",
}
"""JSON values for an id."""

INVALID_ID_SPELLINGS = [
    *("0", "00", "01", "007", "+7", "-7", "-0", "7.0", "7e0", "0x7", "1_0", "7,", "7;", "7/", "/7", "7//", "./7", "7."),
    *("%37", "7%00", "%00", "7%0a", "7%20", "%2f7", "..%2f7", "%ef%bc%97", "%d9%a7", "7%", "%", "%zz", "%25"),
    *(
        "abc",
        "null",
        "NaN",
        "1e999",
        "true",
        "'",
        "1'--",
        "1%20OR%201=1",
        "<b>",
        "*",
        "9223372036854775808",
        DIGITS_5000[:3000],
    ),
    *("count/", "count/1", "batch/", "COUNT", "Batch"),
]

UNKNOWN_PARAMETERS = [
    ("x=1", "x"),
    ("X=1", "X"),
    ("LIMIT=1", "LIMIT"),
    ("limit%00=1", "limit\x00"),
    ("%3Cb%3E=1", "<b>"),
    ("id=1", "id"),
    ("limit[]=1", "limit[]"),
    ("offset=1", "offset"),
    ("%ff=1", None),
    ("=1", None),
]
"""Parameters that no address accepts."""

INVALID_LIST_PARAMETERS = [
    *((f"limit={value}", "limit") for value in ("0", "-1", "1001", "+1", "01", "1.0", "1e2", "0x1", "%D9%A7", "", "a")),
    *(
        (f"limit={value}", "limit")
        for value in (DIGITS_5000[:3000], "1%00", "1%20", "%201", "null", "NaN", "Infinity", "1'--")
    ),
    ("limit", "limit"),
    ("limit=1&limit=1", "limit"),
    ("limit=1&l%69mit=1", "limit"),
    ("q=a&q=b", "q"),
    ("sort=id&sort=id", "sort"),
    ("cursor=a&cursor=a", "cursor"),
    *(
        (f"sort={value}", "sort")
        for value in ("", "-", "--id", "+id", "ID", "words", "version", "id,name", "id%20desc")
    ),
    *(
        (f"sort={value}", "sort")
        for value in ("name%00", "name;DROP%20TABLE%20users", "lower(email)", "1", "id--", "%ff")
    ),
    *(
        (f"cursor={value}", "cursor")
        for value in ("", "nonsense", "aWQ6MQ==", "aWQ6LTE", "%00", "%ff", "'", "W10", "bnVsbA", "e30")
    ),
    ("cursor=" + "A" * 3000, "cursor"),
]

INVALID_SEARCH_PARAMETERS = [
    *(
        (f"q={value}", "q")
        for value in ("", "%20", "+", "%E3%80%80", "%00", "a%00", "a%0ab", "%1b[31m", "%7f", "%c2%9b")
    ),
    *((f"q={value}", "q") for value in ("%ff", "%ed%a0%80", "%c0%af", "%", "%4", "%zz", "a" * 101, "%D0%B0" * 101)),
    ("q", "q"),
    ("q=a&q=a", "q"),
]

INVALID_ETAGS = [
    b"",
    b"abc",
    b'"abc',
    b'abc"',
    b"W/abc",
    b'w/"abc"',
    b'*, "a"',
    b'"a" "b"',
    b'"a"; "b"',
    b"''",
    b'"a b"',
    b",",
]
"""Values of If-Match and If-None-Match that are not lists of ETags."""

INVALID_IDEMPOTENCY_KEYS = [b"", b"a b", b"a\tb", "ключ".encode(), b"\xff", b"k" * 256, b"a,b"]

ACCEPT_WITHOUT_JSON = [b"text/html", b"application/xml", b"application/json;q=0", b"*/*;q=0", b"image/*", b"json"]

NON_JSON_TYPES = [
    *(b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b"text/json", b"json"),
    *(
        b"application/jsonx",
        b"application/json-patch+json",
        b"application/ld+json",
        b"*/*",
        b"application/json, text/plain",
    ),
    *(b"application/json; charset=latin-1", b"application/json; charset=utf-16", b'application/json; charset="koi8-r"'),
]

INVALID_REQUEST_IDS = [b"", b"a b", b"x" * 65, "й".encode(), b"<b>\t</b>", b"\xff\xfe"]

UNUSUAL_TEXTS = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "&lt;b&gt; &amp; &#0;",
    "'; DROP TABLE users; --",
    "' OR '1'='1",
    "$1 %s %(name)s {0} {name} ${jndi:ldap://x}",
    "%00 %0a \\x00 \\u0000 \\",
    'quo"te\\back`tick',
    "=HYPERLINK(1) @SUM(1)",
    "👩‍👩‍👧 семья",
    "ﷺ" * 100,
    "😀" * 100,
    "{{7*7}} #{7*7} <%= 7*7 %>",
    "../../etc/passwd",
    "NULL",
]


@pytest.fixture(scope="module")
def user(stack: Stack) -> Iterator[int]:
    """The user that each test tries to change."""
    new = {"name": "Unspoilt", "email": "unspoilt@example.com"}
    number = int(requests.post(f"{stack.app}/users", json=new, timeout=5).json()["id"])
    yield number
    requests.delete(f"{stack.app}/users/{number}", timeout=5)


@pytest.fixture(scope="module")
def observer(stack: Stack) -> Iterator[psycopg.Connection]:
    with psycopg.connect(stack.postgres, autocommit=True) as connection:
        yield connection


@pytest.fixture
def nothing_changed(stack: Stack, observer: psycopg.Connection, user: int) -> Iterator[None]:
    """Check that the test has stored nothing in PostgreSQL and cached nothing in Redis."""
    redis = stack.redis()

    def stored() -> object:
        return observer.execute(
            "SELECT (SELECT md5(string_agg(users::text, ' ' ORDER BY id)) FROM users), (SELECT count(*) FROM idempotency_keys)"
        ).fetchone()

    def cached() -> set[Any]:
        keys = [key for key in redis.scan_iter() if key != NO_ROW.encode()]  # the relay tries its scripts there
        return {(key, name) for key in keys for name in list(redis.hkeys(key))}

    rows, entries = stored(), cached()
    yield
    assert stored() == rows
    assert cached() <= entries


def body_routes(user: int) -> list[tuple[str, str]]:
    return [("POST", "/users"), ("PUT", f"/users/{user}"), ("PATCH", f"/users/{user}"), ("POST", "/users/batch")]


def all_routes(user: int) -> list[tuple[str, str]]:
    reads = [("GET", "/users"), ("GET", "/users/count"), ("GET", f"/users/{user}")]
    return [*reads, *body_routes(user), ("DELETE", f"/users/{user}")]


def operations(user: int) -> dict[str, bytes]:
    """Return the first members of batch operations that accept fields."""
    return {"create": b'"op": "create"', "update": b'"op": "update", "id": %d' % user}


def parameterised(corpus: dict[str, bytes] | dict[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sent", list(corpus.values()), ids=list(corpus))


@pytest.mark.usefixtures("nothing_changed")
class TestBodies:
    @parameterised(INVALID_JSON_BODIES)
    def test_body_that_is_not_json_is_400(self, base_url: str, user: int, sent: bytes) -> None:
        for method, path in body_routes(user):
            check_raw_problem(send_request(base_url, method, path, JSON, sent), 400)

    @pytest.mark.parametrize("lines", [b"", JSON, b"Content-Type: text/plain\r\n"])
    def test_empty_body_is_400_whatever_its_content_type(self, base_url: str, user: int, lines: bytes) -> None:
        for method, path in body_routes(user):
            response = send_request(base_url, method, path, lines)
            check_raw_problem(response, 400)
            assert response.json["type"] == "/problems/not-json"

    @parameterised(INVALID_JSON_BODIES)
    def test_batch_that_contains_invalid_json_is_400(self, base_url: str, sent: bytes) -> None:
        body = b'{"operations": [%b]}' % (sent or b",")
        check_raw_problem(send_request(base_url, "POST", "/users/batch", JSON, body), 400)

    @parameterised(NON_OBJECT_BODIES)
    def test_json_that_is_not_an_object_is_422(self, base_url: str, user: int, sent: bytes) -> None:
        for method, path in body_routes(user):
            check_raw_problem(send_request(base_url, method, path, JSON, sent), 422, "body")
        check_raw_problem(
            send_request(base_url, "POST", "/users/batch", JSON, b'{"operations": [%b]}' % sent), 422, "operations.0"
        )
        if not sent.startswith(b"["):
            check_raw_problem(
                send_request(base_url, "POST", "/users/batch", JSON, b'{"operations": %b}' % sent), 422, "operations"
            )

    @parameterised({**NON_STRINGS, **INVALID_LINES, **INVALID_NAMES})
    def test_invalid_name_is_422(self, base_url: str, user: int, sent: str) -> None:
        self.check_field_is_refused(base_url, user, "name", sent, '"email": "spoilt@example.com"')

    @parameterised({**NON_STRINGS, **INVALID_LINES, **INVALID_EMAILS})
    def test_invalid_email_is_422(self, base_url: str, user: int, sent: str) -> None:
        self.check_field_is_refused(base_url, user, "email", sent, '"name": "Spoilt"')

    @parameterised({**NON_STRINGS, **INVALID_LINES})
    @pytest.mark.parametrize(
        "field", ["admin", "__class__", "<b>", "a'--", "Name", "name ", "n\\u00e4me", "$where", "constructor", ""]
    )
    def test_unknown_field_is_422(self, base_url: str, user: int, field: str, sent: str) -> None:
        self.check_field_is_refused(base_url, user, field, sent, '"name": "Spoilt", "email": "spoilt@example.com"')

    def check_field_is_refused(self, base_url: str, user: int, field: str, sent: str, rest: str) -> None:
        """Check that each route refuses the value `sent` of this field; `rest` are the other members of the body."""
        name = json.loads(f'"{field}"')
        body = f'{{"{field}": {sent}, {rest}}}'.encode()
        for method, path in body_routes(user)[:3]:
            check_raw_problem(send_request(base_url, method, path, JSON, body), 422, name)
        for operation in operations(user).values():
            batch = b'{"operations": [{%b, %b]}' % (operation, body[1:])
            check_raw_problem(send_request(base_url, "POST", "/users/batch", JSON, batch), 422, f"operations.0.{name}")

    @parameterised(INVALID_IDS)
    def test_invalid_id_in_a_batch_is_422(self, base_url: str, sent: str) -> None:
        for op in ('"op": "delete"', '"op": "update", "name": "Spoilt"'):
            body = f'{{"operations": [{{{op}, "id": {sent}}}]}}'.encode()
            check_raw_problem(send_request(base_url, "POST", "/users/batch", JSON, body), 422, "operations.0.id")

    @pytest.mark.parametrize(
        ("body", "field"),
        [
            ("{}", "operations"),
            ('{"operations": []}', "operations"),
            (json.dumps({"operations": [{"op": "delete", "id": 1}] * 1001}), "operations"),
            ('{"operations": [{"op": "delete", "id": 1}], "x": 1}', "x"),
            ('{"operations": [{}]}', "operations.0.op"),
            ('{"operations": [{"id": 1}]}', "operations.0.op"),
            ('{"operations": [{"op": "drop", "id": 1}]}', "operations.0.op"),
            ('{"operations": [{"op": "DELETE", "id": 1}]}', "operations.0.op"),
            ('{"operations": [{"op": null, "id": 1}]}', "operations.0.op"),
            ('{"operations": [{"op": ["delete"], "id": 1}]}', "operations.0.op"),
            ('{"operations": [{"op": "delete"}]}', "operations.0.id"),
            ('{"operations": [{"op": "delete", "id": 1, "name": "x"}]}', "operations.0.name"),
            ('{"operations": [{"op": "update", "name": "x"}]}', "operations.0.id"),
            ('{"operations": [{"op": "update", "id": 1}]}', "operations.0"),
            ('{"operations": [{"op": "create", "name": "x"}]}', "operations.0.email"),
            ('{"operations": [{"op": "delete", "id": 1}, {"op": "create", "name": "x"}]}', "operations.1.email"),
        ],
    )
    def test_malformed_batch_is_422_and_the_field_is_named(self, base_url: str, body: str, field: str) -> None:
        check_raw_problem(send_request(base_url, "POST", "/users/batch", JSON, body.encode()), 422, field)

    def test_every_invalid_field_is_named(self, base_url: str) -> None:
        response = send_request(base_url, "POST", "/users", JSON, b'{"name": "", "email": 7, "x": 1}')
        check_raw_problem(response, 422)
        assert {error["field"] for error in response.json["errors"]} == {"name", "email", "x"}

    def test_truncated_body_is_400_or_gets_no_response(self, base_url: str, user: int) -> None:
        body = NEW_USER_BODY
        for method, path in body_routes(user)[:3]:
            with suppress(NoResponse):  # the client has closed its side, so the server need not respond
                check_raw_problem(send_request(base_url, method, path, JSON, body, length=len(body) + 10), 400)

    def test_truncated_or_malformed_chunks_are_400(self, base_url: str, user: int) -> None:
        chunked = JSON + b"Transfer-Encoding: chunked\r\n"
        body = NEW_USER_BODY
        for method, path in body_routes(user)[:3]:
            check_raw_problem(send_request(base_url, method, path, chunked, b"zz\r\n" + body + b"\r\n0\r\n\r\n"), 400)
            with suppress(NoResponse):
                check_raw_problem(
                    send_request(base_url, method, path, chunked, b"%x\r\n%b\r\n" % (len(body), body), length=1), 400
                )

    def test_content_length_over_the_limit_is_413(self, base_url: str, user: int) -> None:
        for method, path in body_routes(user):
            limit = 2 * 1024 * 1024 if path.endswith("/batch") else 64 * 1024
            check_raw_problem(send_request(base_url, method, path, JSON, b"", length=limit + 1), 413)

    def test_chunked_body_over_the_limit_is_413(self, base_url: str, user: int) -> None:
        body = NEW_USER_BODY + b" " * 64 * 1024
        for method, path in body_routes(user)[:3]:
            sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            check_raw_problem(send_request(base_url, method, path, JSON + b"Transfer-Encoding: chunked\r\n", sent), 413)


@pytest.mark.usefixtures("nothing_changed")
class TestAddresses:
    @pytest.mark.parametrize("spelling", INVALID_ID_SPELLINGS)
    def test_other_spellings_of_an_id_are_404(self, stack: Stack, base_url: str, spelling: str) -> None:
        # Nginx itself refuses an invalid percent-encoding and an encoded NUL.
        refused_by_nginx = base_url == stack.edge and re.search("%(?![0-9a-fA-F]{2})|%00", spelling)
        status = 400 if refused_by_nginx else 404
        for method in ("GET", "PUT", "PATCH", "DELETE"):
            body = b'{"name": "Spoilt"}' if method[0] == "P" else b""
            check_raw_problem(send_request(base_url, method, f"/users/{spelling}", JSON, body), status)
        assert send_request(base_url, "HEAD", f"/users/{spelling}").status == status

    @pytest.mark.parametrize(("query", "field"), UNKNOWN_PARAMETERS)
    def test_unknown_parameters_are_400_at_every_address(
        self, base_url: str, user: int, query: str, field: str | None
    ) -> None:
        for method, path in all_routes(user):
            body = NEW_USER_BODY if method[0] == "P" else b""
            for _ in range(2):
                check_raw_problem(send_request(base_url, method, f"{path}?{query}", JSON, body), 400, field)

    @pytest.mark.parametrize(("query", "field"), [*INVALID_LIST_PARAMETERS, *INVALID_SEARCH_PARAMETERS])
    def test_invalid_parameters_of_a_list_are_400(self, base_url: str, query: str, field: str) -> None:
        for target in (f"/users?{query}", f"/users?{query}&sort=name" if field == "q" else f"/users?{query}&q=alice"):
            for _ in range(2):
                response = send_request(base_url, "GET", target)
                check_raw_problem(response, 400, field)
                assert response.headers.get("x-cache-status") != "HIT"
            assert send_request(base_url, "HEAD", target).status == 400

    @pytest.mark.parametrize(
        ("query", "field"),
        [*INVALID_SEARCH_PARAMETERS, ("limit=1", "limit"), ("sort=id", "sort"), ("cursor=a", "cursor")],
    )
    def test_invalid_parameters_of_a_count_are_400(self, base_url: str, query: str, field: str) -> None:
        check_raw_problem(send_request(base_url, "GET", f"/users/count?{query}"), 400, field)

    def test_too_many_parameters_are_400(self, base_url: str) -> None:
        check_raw_problem(send_request(base_url, "GET", "/users?" + "&".join(f"p{n}=1" for n in range(200))), 400)


@pytest.mark.usefixtures("nothing_changed")
class TestHeaders:
    @pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
    @pytest.mark.parametrize("value", INVALID_ETAGS)
    def test_malformed_precondition_is_400(
        self, stack: Stack, base_url: str, user: int, header: str, value: bytes
    ) -> None:
        line = b"%b: %b\r\n" % (header.encode(), value)
        for method in ("PUT", "PATCH", "DELETE"):
            response = send_request(
                base_url, method, f"/users/{user}", JSON + line, b'{"name": "Spoilt"}' if method != "DELETE" else b""
            )
            # The edge itself refuses an empty value, without naming the header.
            check_raw_problem(response, 400, header if value or base_url == stack.app else None)

    @pytest.mark.parametrize("value", [b"Sun, 06 Nov 1994 08:49:37 GMT", b"yesterday", b"\xff"])
    def test_if_unmodified_since_on_a_write_is_400(self, base_url: str, user: int, value: bytes) -> None:
        line = b"If-Unmodified-Since: %b\r\n" % value
        for method in ("PUT", "PATCH", "DELETE"):
            response = send_request(
                base_url, method, f"/users/{user}", JSON + line, b'{"name": "Spoilt"}' if method != "DELETE" else b""
            )
            check_raw_problem(response, 400, "If-Unmodified-Since")

    @pytest.mark.parametrize("value", INVALID_IDEMPOTENCY_KEYS)
    def test_invalid_idempotency_key_is_400(self, stack: Stack, base_url: str, value: bytes) -> None:
        line = b"Idempotency-Key: %b\r\n" % value
        field = "Idempotency-Key" if value or base_url == stack.app else None
        check_raw_problem(send_request(base_url, "POST", "/users", JSON + line, NEW_USER_BODY), 400, field)
        batch = b'{"operations": [{"op": "create", %b]}' % NEW_USER_BODY[1:]
        check_raw_problem(send_request(base_url, "POST", "/users/batch", JSON + line, batch), 400, field)

    @pytest.mark.parametrize("value", ACCEPT_WITHOUT_JSON)
    def test_client_that_does_not_accept_json_gets_406(self, base_url: str, user: int, value: bytes) -> None:
        for method, path in all_routes(user):
            body = NEW_USER_BODY if method[0] == "P" else b""
            check_raw_problem(send_request(base_url, method, path, JSON + b"Accept: %b\r\n" % value, body), 406)

    @pytest.mark.parametrize("value", NON_JSON_TYPES)
    def test_content_type_other_than_json_is_415(self, base_url: str, user: int, value: bytes) -> None:
        for method, path in body_routes(user):
            check_raw_problem(send_request(base_url, method, path, b"Content-Type: %b\r\n" % value, NEW_USER_BODY), 415)

    @pytest.mark.parametrize("sent", [NEW_USER_BODY, b"nope", b"[" * 30_000])
    def test_body_without_a_content_type_is_415_and_the_detail_names_the_header(
        self, base_url: str, user: int, sent: bytes
    ) -> None:
        for method, path in body_routes(user):
            chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(sent), sent)
            for response in (
                send_request(base_url, method, path, b"", sent),
                send_request(base_url, method, path, b"Transfer-Encoding: chunked\r\n", chunks),
            ):
                check_raw_problem(response, 415)
                assert "Content-Type: application/json" in response.json["detail"]
                assert "application/json" in response.headers["accept-patch" if method == "PATCH" else "accept"]

    def test_empty_content_type_is_refused(self, stack: Stack, base_url: str, user: int) -> None:
        for method, path in body_routes(user):
            response = send_request(base_url, method, path, b"Content-Type:\r\n", NEW_USER_BODY)
            check_raw_problem(
                response, 415 if base_url == stack.app else 400
            )  # the edge itself refuses an empty header

    def test_merge_patch_type_is_415_for_other_methods_than_patch(self, base_url: str, user: int) -> None:
        for method, path in body_routes(user):
            if method != "PATCH":
                response = send_request(
                    base_url, method, path, b"Content-Type: application/merge-patch+json\r\n", b'{"name": "Spoilt"}'
                )
                check_raw_problem(response, 415)

    def test_compressed_body_is_415(self, base_url: str, user: int) -> None:
        for method, path in body_routes(user):
            check_raw_problem(
                send_request(base_url, method, path, JSON + b"Content-Encoding: gzip\r\n", b"\x1f\x8b"), 415
            )

    @pytest.mark.parametrize("value", INVALID_REQUEST_IDS)
    def test_invalid_request_id_is_replaced(self, base_url: str, value: bytes) -> None:
        response = send_request(base_url, "GET", "/users/0", b"X-Request-Id: %b\r\n" % value)
        check_raw_problem(response, 404)
        assert response.headers["x-request-id"] != value.decode("latin-1")

    @pytest.mark.parametrize("name", ["Cookie", "Authorization", "Referer", "If-None-Match"])
    def test_header_of_8_kilobytes_is_no_error(self, base_url: str, user: int, name: str) -> None:
        header = f"{name}: {'a' * 8192}\r\n".encode()
        assert send_request(base_url, "GET", f"/users/{user}", header).status == 200
        assert send_request(base_url, "POST", "/users", JSON + header, b"{}").status == 422


@pytest.mark.usefixtures("nothing_changed")
class TestInvalidHttp:
    """Requests that reach no app: the edge responds."""

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (b"GET /users?q=\xff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
            (b"GET /users/\x00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
            (b"GET /users HTTP/1.1\r\nHost: localhost\r\nA: \x00\r\nConnection: close\r\n\r\n", 400),
            (b"GET /users HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
            (b"GET /users HTTP/1.1\r\nHost: localhost\r\nHost: y\r\nConnection: close\r\n\r\n", 400),
            (b"GET /users HTTP/9.9\r\nHost: localhost\r\n\r\n", 505),
            (b"get /users HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
            (b"POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\nConnection: close\r\n\r\n", 400),
            (b"POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1, 2\r\nConnection: close\r\n\r\n", 400),
            (b"POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nContent-Length: 9\r\n\r\n", 400),
            (
                b"POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
                400,
            ),
            (b"GET /users?q=" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
            (b"GET /users HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 20000 + b"\r\n\r\n", 431),
            (b"GARBAGE\r\n\r\n", 400),
        ],
    )
    def test_response_to_invalid_http_is_a_problem(self, stack: Stack, request_: bytes, status: int) -> None:
        check_raw_problem(parse_response(send_bytes(stack.edge, request_)), status)


class TestTexts:
    @pytest.mark.parametrize("text", UNUSUAL_TEXTS)
    def test_unusual_text_is_returned_unchanged(self, stack: Stack, base_url: str, text: str) -> None:
        new = {"name": text, "email": "texts@example.com"}
        created = send_request(base_url, "POST", "/users", JSON, json.dumps(new).encode())
        assert created.status == 201, created
        location = created.headers["location"]
        try:
            for edge in stack.edges:
                assert self.name_at(edge, location) == text
                newest = [row["name"] for row in send_request(edge, "GET", "/users?sort=-id&limit=1").json]
                assert newest == [text]
            assert (
                send_request(base_url, "PATCH", location, JSON, json.dumps({"name": f"{text[:-1]}!"}).encode()).status
                == 200
            )
            for edge in stack.edges:
                assert self.name_at(edge, location) == f"{text[:-1]}!"
        finally:
            send_request(base_url, "DELETE", location)

    def name_at(self, edge: str, location: str) -> str:
        return str(send_request(edge, "GET", location).json["name"])

    @pytest.mark.parametrize(
        "email", ["o'brien+tag--x@example.com", "a$b%c&d@example.com", "{x}|y@example.com", "почта@пример.рф"]
    )
    def test_unusual_email_is_returned_unchanged(self, base_url: str, email: str) -> None:
        created = send_request(base_url, "POST", "/users", JSON, json.dumps({"name": "E", "email": email}).encode())
        assert created.status == 201, created
        assert send_request(base_url, "GET", created.headers["location"]).json["email"] == email
        send_request(base_url, "DELETE", created.headers["location"])


def test_invalid_input_has_changed_no_user_and_caused_no_unexpected_error(stack: Stack, user: int) -> None:
    def is_unchanged() -> bool:
        responses: list[RawResponse] = [send_request(edge, "GET", f"/users/{user}") for edge in stack.edges]
        return all(response.status == 200 and response.json["name"] == "Unspoilt" for response in responses)

    wait_until(is_unchanged)
    for app in ("app1", "app2"):
        assert '"unexpected"' not in stack.log(app)
        assert '"postgres.error"' not in stack.log(app)
