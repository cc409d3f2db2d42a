"""API keys: what each scope may do, which answer a bad key gets, and what the log says."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
import requests

from testkit.api import check_problem
from testkit.fake_app import FakeApp, fake_app, plain, refused_by_edge
from testkit.stack import ROOT, Stack, free_ports, refused, run, running, wait_until
from velikiy.keys import tokens
from velikiy.settings import BadSetting, auth_mode

QUOTA = 50
"""Idempotency keys of one API key in 24 hours."""


@pytest.fixture(scope="module")
def keyed_stack() -> Iterator[Stack]:
    """Every request needs a key. A short EDGE_TTL would hide an entry that a revocation failed to drop."""
    settings: Any = {
        "AUTH": "all",
        "EDGE_TTL": "600",
        "CORS_ORIGINS": "http://app.example",
        "IDEMPOTENCY_QUOTA": str(QUOTA),
    }
    with running("--edges", "2", "--apps", "1", **settings) as stack:
        yield stack


@pytest.fixture(scope="module")
def guarded_stack() -> Iterator[Stack]:
    """Only writes need a key."""
    with running("--apps", "1", AUTH="writes") as stack:
        yield stack


@pytest.fixture(params=["app", "edge"])
def keyed(request: pytest.FixtureRequest, keyed_stack: Stack) -> str:
    return keyed_stack.app if request.param == "app" else keyed_stack.edge


def velikiy(stack: Stack, *arguments: str, fails: bool = False) -> str:
    """Run `./run velikiy keys ...`. Return what it prints to stdout, or to stderr if it fails."""
    completed = run("velikiy", "--data", str(stack.data), "keys", *arguments)
    assert (completed.returncode != 0) == fails, completed.stderr
    assert "Traceback" not in completed.stderr
    return (completed.stderr if fails else completed.stdout).strip()


def new_key(stack: Stack, name: str, scope: str = "write", *options: str) -> str:
    return velikiy(stack, "create", name, "--scope", scope, *options)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def writer(keyed_stack: Stack) -> str:
    return new_key(keyed_stack, "writer")


@pytest.fixture(scope="module")
def reader(keyed_stack: Stack) -> str:
    return new_key(keyed_stack, "reader", "read")


def status(url: str, key: str) -> int:
    return requests.get(url, headers=bearer(key), timeout=5).status_code


def check_unauthorized(response: requests.Response) -> None:
    assert check_problem(response, 401) == "A valid API key is needed here. Send it as Authorization: Bearer <key>."
    assert response.json()["type"] == "/problems/unauthorized"
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_cached_read_with_a_key_is_a_hit_and_without_a_key_401(keyed_stack: Stack, reader: str) -> None:
    url = f"{keyed_stack.edge}/users/1"
    wait_until(
        lambda: requests.get(url, headers=bearer(reader), timeout=5).headers["X-Cache-Status"] == "HIT",
        what="a hit with a key",
    )
    check_unauthorized(requests.get(url, timeout=5))


@pytest.mark.parametrize(
    "path", ["/users/1", "/users", "/users/count", "/users/1/history", "/users/999999", "/nothing", "/users?unknown=1"]
)
def test_every_read_needs_a_key(keyed: str, reader: str, path: str) -> None:
    check_unauthorized(requests.get(f"{keyed}{path}", timeout=5))
    assert requests.head(f"{keyed}{path}", timeout=5).status_code == 401
    assert status(f"{keyed}{path}", reader) in (200, 400, 404)


def test_history_names_the_key_that_has_written(keyed: str, writer: str) -> None:
    body, headers = {"name": "Keyed", "email": "keyed@example.com"}, bearer(writer)
    url = keyed + requests.post(f"{keyed}/users", json=body, headers=headers, timeout=5).headers["Location"]
    requests.patch(url, json={"name": "Again"}, headers=headers, timeout=5)
    requests.delete(url, headers=headers, timeout=5)
    items = requests.get(f"{url}/history", headers=headers, timeout=5).json()
    assert [(it["change"], it["through"], it["changed_by"]) for it in reversed(items)] == [
        (change, "api", "writer") for change in ("create", "update", "delete")
    ]


@pytest.mark.parametrize(
    "path",
    [
        *("/livez", "/readyz", "/health", "/docs", "/openapi.json", "/problems/unauthorized"),
        *("/favicon.ico", "/robots.txt"),
    ],
)
def test_health_and_documentation_need_no_key(keyed: str, path: str) -> None:
    assert requests.get(f"{keyed}{path}", timeout=5).status_code == 200


def test_bad_keys_get_the_same_answer_as_no_key(keyed: str, keyed_stack: Stack, writer: str) -> None:
    revoked = new_key(keyed_stack, "revoked")
    velikiy(keyed_stack, "revoke", "revoked")
    flipped = writer[:-1] + ("0" if writer[-1] != "0" else "1")
    credentials = [
        *[
            "",
            "Bearer",
            "Bearer ",
            "Basic dXNlcjpwYXNz",
            f"Basic {writer}",
            writer,
            f"Bearer {writer}, Bearer {writer}",
        ],
        *[f"Bearer {key}" for key in (revoked, flipped, tokens.new(), writer[:-1], writer + "0", writer.upper(), "?")],
        "Bearer " + "x" * 5000,
    ]
    for value in credentials:
        for method, path in (("GET", "/users/1"), ("POST", "/users")):
            response = requests.request(
                method,
                f"{keyed}{path}",
                headers={"Authorization": value},
                json={"email": "alice@example.com"},
                timeout=5,
            )
            check_unauthorized(response)


@pytest.mark.parametrize("spelling", ["Bearer {}", "bearer {}", "BEARER   {}"])
def test_scheme_is_compared_without_case(keyed: str, reader: str, spelling: str) -> None:
    headers = {"Authorization": spelling.format(reader)}
    assert requests.get(f"{keyed}/users/1", headers=headers, timeout=5).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_key_with_the_scope_read_may_not_write(keyed: str, reader: str, method: str) -> None:
    path = "/users" if method == "POST" else "/users/1"
    response = requests.request(method, f"{keyed}{path}", headers=bearer(reader), json={"name": "Eve"}, timeout=5)
    check_problem(response, 403)
    assert response.json()["type"] == "/problems/forbidden"
    assert response.headers["WWW-Authenticate"] == 'Bearer error="insufficient_scope", scope="write"'


def test_key_with_the_scope_write_reads_and_writes(keyed: str, writer: str) -> None:
    created = requests.post(
        f"{keyed}/users", json={"name": "Kay", "email": "kay@example.com"}, headers=bearer(writer), timeout=5
    )
    assert created.status_code == 201
    url = f"{keyed}{created.headers['Location']}"
    assert requests.put(url, json={"name": "Kai"}, headers=bearer(writer), timeout=5).status_code == 200
    assert requests.get(url, headers=bearer(writer), timeout=5).json()["name"] == "Kai"
    assert requests.delete(url, headers=bearer(writer), timeout=5).status_code == 200


def test_preflight_needs_no_key_and_allows_the_header(keyed: str) -> None:
    headers = {"Origin": "http://app.example", "Access-Control-Request-Method": "PUT"}
    response = requests.options(f"{keyed}/users/1", headers=headers, timeout=5)
    assert response.status_code == 204
    assert "Authorization" in response.headers["Access-Control-Allow-Headers"]


def test_page_of_an_allowed_origin_can_read_a_401(keyed: str) -> None:
    response = requests.get(f"{keyed}/users/1", headers={"Origin": "http://app.example"}, timeout=5)
    check_unauthorized(response)
    assert response.headers["Access-Control-Allow-Origin"] == "http://app.example"


def test_expired_key_is_refused_at_its_second(keyed_stack: Stack) -> None:
    key = new_key(keyed_stack, "short", "read", "--expires", "4s")
    [(expires_at,)] = keyed_stack.sql("SELECT expires_at FROM api_keys WHERE name = 'short'")
    urls = [f"{base}/users/1" for base in (*keyed_stack.edges, keyed_stack.app)]
    accepted = 0
    while (now := datetime.now(UTC)) < expires_at + timedelta(seconds=1.5):
        for url in urls:
            began, accepts = datetime.now(UTC), status(url, key) == 200
            assert accepts or datetime.now(UTC) >= expires_at - timedelta(milliseconds=10), (url, now)
            # Nginx reads its clock once in a round of its event loop.
            assert not accepts or began < expires_at + timedelta(milliseconds=100), (url, now)
            accepted += accepts
    assert accepted
    assert [row["state"] for row in json.loads(velikiy(keyed_stack, "list", "--json")) if row["name"] == "short"] == [
        "expired"
    ]


def test_rotation_replaces_the_key_at_once_or_after_an_overlap(keyed_stack: Stack) -> None:
    urls = [f"{base}/users/1" for base in (*keyed_stack.edges, keyed_stack.app)]
    first = new_key(keyed_stack, "rotated", "read", "--expires", "30d")
    assert [status(url, first) for url in urls] == [200, 200, 200]
    second = velikiy(keyed_stack, "rotate", "rotated")
    assert [status(url, first) for url in urls] == [401, 401, 401]
    assert [status(url, second) for url in urls] == [200, 200, 200]
    third = json.loads(velikiy(keyed_stack, "rotate", "rotated", "--overlap", "1h", "--json"))
    assert third["scope"] == "read"
    lifetime = datetime.fromisoformat(third["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < lifetime <= timedelta(days=30)
    assert [status(url, second) for url in urls] == [200, 200, 200]
    assert [status(url, third["key"]) for url in urls] == [200, 200, 200]
    velikiy(keyed_stack, "revoke", "rotated")
    assert [status(url, second) for url in urls] == [401, 401, 401]
    assert [status(url, third["key"]) for url in urls] == [401, 401, 401]


def test_commands_print_a_table_or_json_and_never_a_key_again(keyed_stack: Stack) -> None:
    created = json.loads(velikiy(keyed_stack, "create", "listed", "--scope", "read", "--json"))
    assert created.keys() == {"id", "name", "scope", "expires_at", "key"}
    head, *lines = velikiy(keyed_stack, "list").splitlines()
    assert head.split() == ["ID", "NAME", "SCOPE", "STATE", "KEY", "CREATED", "EXPIRES", "LAST", "USED"]
    [line] = [line for line in lines if " listed " in line]
    assert line.split()[:5] == [str(created["id"]), "listed", "read", "valid", f"{created['key'][:8]}..."]
    for output in ("\n".join(lines), velikiy(keyed_stack, "list", "--all", "--json")):
        assert created["key"] not in output
    assert keyed_stack.sql("SELECT count(*) FROM api_keys t WHERE t::text LIKE %s", f"%{created['key'][10:]}%") == [
        (0,)
    ]
    assert json.loads(velikiy(keyed_stack, "revoke", str(created["id"]), "--json")) == {"revoked": [created["id"]]}
    assert " listed " not in velikiy(keyed_stack, "list")
    assert " listed " in velikiy(keyed_stack, "list", "--all")


def test_commands_refuse_what_makes_no_sense_with_a_sentence(keyed_stack: Stack, writer: str) -> None:
    assert status(f"{keyed_stack.app}/users/1", writer) == 200  # the key exists
    for arguments, sentence in [
        (("create", "writer", "--scope", "read"), "a key named writer exists"),
        (("create", "7", "--scope", "read"), "beginning with a letter"),
        (("create", "eve@example.com", "--scope", "read"), "beginning with a letter"),
        (("create", "k"), "--scope"),
        (("create", "k", "--scope", "admin"), "admin"),
        (("create", "k", "--scope", "read", "--expires", "soon"), "'soon' is no time"),
        (("create", "k", "--scope", "read", "--expires", "2020-01-01"), "is in the past"),
        (("revoke", "nobody"), "no valid key has the name or id nobody"),
        (("rotate", "nobody"), "no valid key has the name nobody"),
        (("rotate", "writer", "--overlap", "x"), "'x' is no duration"),
    ]:
        assert sentence in velikiy(keyed_stack, *arguments, fails=True)


def test_last_use_is_recorded_also_for_hits(keyed_stack: Stack) -> None:
    key = new_key(keyed_stack, "used", "read")

    def last_use() -> str | None:
        [row] = [row for row in json.loads(velikiy(keyed_stack, "list", "--json")) if row["name"] == "used"]
        return row["last_used_at"]  # type: ignore[no-any-return]

    assert last_use() is None
    assert status(f"{keyed_stack.edge}/users/1", key) == 200
    assert last_use() is not None


def test_audit_log_says_which_key_wrote_what_without_personal_data(
    keyed_stack: Stack, writer: str, reader: str
) -> None:
    body = {"name": "Audited Person", "email": "audited@example.com"}
    created = requests.post(f"{keyed_stack.edge}/users", json=body, headers=bearer(writer), timeout=5)
    row_id = created.json()["id"]
    requests.delete(f"{keyed_stack.edge}/users/{row_id}", headers=bearer(reader), timeout=5)
    requests.delete(f"{keyed_stack.edge}/users/{row_id}", headers=bearer(writer), timeout=5)

    def lines() -> list[tuple[str, str, str, int]]:
        found = [json.loads(line) for line in keyed_stack.log("app1").splitlines() if '"event":"audit"' in line]
        return [(it["key"], it["method"], it["route"], it["status"]) for it in found if it["row_id"] == row_id]

    row = "/users/{id}"
    expected = [("writer", "POST", "/users", 201), ("reader", "DELETE", row, 403), ("writer", "DELETE", row, 200)]
    wait_until(lambda: lines() == expected)
    for name in ("app1", "edge1", "edge2"):
        log = keyed_stack.log(name)
        assert writer not in log
        assert writer[10:] not in log
        assert "audited" not in log.lower().replace('"event":"audit"', "")


def test_idempotency_keys_of_two_api_keys_do_not_meet(keyed_stack: Stack, writer: str) -> None:
    other = new_key(keyed_stack, "other")
    url = f"{keyed_stack.edge}/users"
    created = []
    for key, email in ((writer, "first@example.com"), (other, "second@example.com"), (writer, "first@example.com")):
        headers = {**bearer(key), "Idempotency-Key": "same"}
        created.append(requests.post(url, json={"name": "N", "email": email}, headers=headers, timeout=5))
    assert [response.status_code for response in created] == [201, 201, 201]
    assert created[0].json() == created[2].json() != created[1].json()
    for response in created[:2]:
        requests.delete(f"{keyed_stack.edge}{response.headers['Location']}", headers=bearer(writer), timeout=5)


def post_once(stack: Stack, key: str, name: str, email: str) -> requests.Response:
    headers = {**bearer(key), "Idempotency-Key": name}
    return requests.post(f"{stack.edge}/users", json={"name": "N", "email": email}, headers=headers, timeout=5)


def test_quota_of_idempotency_keys_belongs_to_the_api_key(keyed_stack: Stack, writer: str) -> None:
    crowded = new_key(keyed_stack, "crowded")
    assert post_once(keyed_stack, crowded, "first", "crowded@example.com").status_code == 201
    keyed_stack.sql(
        "INSERT INTO idempotency_keys (key, owner, request, response)"
        " SELECT 'crowded ' || n, 'crowded', '', '{}' FROM generate_series(1, %s) n",
        QUOTA,
    )
    rotated = velikiy(keyed_stack, "rotate", "crowded")  # the name, and with it the quota, stays
    numbers = count()

    def refused() -> list[requests.Response]:
        """Each process counts again after a part of the quota, so the first requests may be carried out."""
        number = next(numbers)
        response = post_once(keyed_stack, rotated, f"more-{number}", f"more-{number}@example.com")
        assert response.status_code in (201, 429)
        return [response] if response.status_code == 429 else []  # a refusal counts as false

    [response] = wait_until(refused, every=0)
    assert next(numbers) <= QUOTA // 5 + 4  # two processes
    check_problem(response, 429)
    assert response.json()["type"] == "/problems/too-many-requests"
    assert 86_000 < int(response.headers["Retry-After"]) <= 86_400
    assert post_once(keyed_stack, rotated, "first", "crowded@example.com").headers["Idempotency-Replayed"] == "true"
    assert post_once(keyed_stack, writer, "more", "more@example.com").status_code == 201


def test_new_key_with_the_name_of_a_revoked_key_gets_none_of_its_responses(keyed_stack: Stack) -> None:
    first = post_once(keyed_stack, new_key(keyed_stack, "heir"), "inherited", "heir@example.com")
    velikiy(keyed_stack, "revoke", "heir")
    second = post_once(keyed_stack, new_key(keyed_stack, "heir"), "inherited", "other-heir@example.com")
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.headers["Location"] != second.headers["Location"]


@pytest.mark.parametrize("part", ["app", "edge"])
def test_only_writes_need_a_key_with_auth_writes(guarded_stack: Stack, part: str) -> None:
    base = guarded_stack.app if part == "app" else guarded_stack.edge
    assert requests.get(f"{base}/users/1", timeout=5).status_code == 200
    assert status(f"{base}/users/1", "nonsense") == 200
    check_unauthorized(requests.put(f"{base}/users/1", json={"name": "Eve"}, timeout=5))
    check_unauthorized(requests.post(f"{base}/users/batch", json={"operations": []}, timeout=5))
    key = new_key(guarded_stack, f"for-{part}")
    assert requests.put(f"{base}/users/1", json={"name": "Eve"}, headers=bearer(key), timeout=5).status_code == 200


def test_addresses_of_keys_are_not_for_clients(keyed_stack: Stack, writer: str) -> None:
    for path in (f"/.keys/{tokens.digest(writer)}", "/.key"):
        response = requests.get(f"{keyed_stack.edge}{path}", headers=bearer(writer), timeout=5)
        check_problem(response, 404)


@pytest.fixture
def edge_without_keys() -> Iterator[FakeApp]:
    with fake_app(AUTH="off") as app:
        yield app


def test_only_a_key_is_passed_on_to_an_app(edge_without_keys: FakeApp) -> None:
    app, key = edge_without_keys, tokens.new()
    app.respond = plain
    sent = {"Basic dXNlcjpwYXNz": "?", f"bearer  {key}": f"Bearer {key}", f"Bearer {key}": f"Bearer {key}", "": None}
    for value in sent:
        requests.put(f"{app.edge}/users/7", json={}, headers={"Authorization": value}, timeout=5)
    assert [request.headers.get("authorization") for request in app.received] == list(sent.values())


def test_token_has_a_prefix_and_a_checksum() -> None:
    token = tokens.new()
    assert tokens.is_well_formed(token)
    for position in range(len(token)):
        for other in "a0":
            changed = token[:position] + other + token[position + 1 :]
            assert tokens.is_well_formed(changed) == (changed == token)
    assert len({tokens.new() for _ in range(1000)}) == 1000


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.9", "::1", "[::1]", "localhost"])
def test_auth_is_off_on_a_loopback_address(bind: str) -> None:
    assert auth_mode(None, bind) == "off"


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "192.0.2.1", "users.example"])
def test_auth_must_be_set_beyond_loopback(bind: str) -> None:
    for auth in ("off", "writes", "all"):
        assert auth_mode(auth, bind) == auth
    with pytest.raises(BadSetting, match="AUTH must be set: writes"):
        auth_mode(None, bind)
    assert "AUTH must be set" in refused_by_edge(BIND=bind)


def test_launcher_refuses_to_publish_without_auth() -> None:
    data = f"/tmp/velikiy-test-refused-{free_ports(1)}"
    assert "AUTH must be set" in refused("up", "--detach", "--data", data, "--bind", "0.0.0.0")
    assert "'off', 'writes' or 'all'" in refused("up", "--detach", "--data", data, AUTH="some")
    assert "must be off, writes or all" in refused_by_edge(AUTH="some")


def test_containers_get_auth() -> None:
    assert "\n  AUTH:\n" in (ROOT / "compose.yaml").read_text()
