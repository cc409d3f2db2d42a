"""A request with an Idempotency-Key is carried out once, whatever dies in between, and its response is replayed."""

import os
import re
import signal
import socket
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import requests

from testkit.api import check_problem
from testkit.outages import refusing
from testkit.raw_http import check_raw_problem, send_request
from testkit.stack import Stack, children_of, running, status_of, wait_until


@pytest.fixture
def key(stack: Stack) -> Iterator[str]:
    """An unused idempotency key. The fixture deletes the users and the stored responses of keys that begin with it."""
    name = str(uuid.uuid4())
    yield name
    for edge in stack.edges[:1]:
        for (user,) in stack.sql("SELECT id FROM users WHERE email LIKE %s", f"{name}%"):
            requests.delete(f"{edge}/users/{user}", timeout=5)
    stack.sql("DELETE FROM idempotency_keys WHERE key LIKE %s", f"{name}%")


def user_body(key: str, **more: str) -> dict[str, str]:
    return {"name": "Once", "email": f"{key}@example.com", **more}


def post(base_url: str, key: str, body: dict[str, Any], path: str = "/users") -> requests.Response:
    return requests.post(base_url + path, json=body, headers={"Idempotency-Key": key}, timeout=10)


def count_users(stack: Stack, key: str) -> int:
    return int(stack.sql("SELECT count(*) FROM users WHERE email LIKE %s", f"{key}%")[0][0])


def batch_body(key: str, count: int = 3) -> dict[str, Any]:
    return {"operations": [{"op": "create", "name": "Once", "email": f"{key}{n}@example.com"} for n in range(count)]}


@contextmanager
def inserts_blocked(stack: Stack) -> Iterator[None]:
    """Hold a lock on the table, so that every INSERT of a user waits."""
    with psycopg.connect(stack.postgres) as connection:
        connection.execute("LOCK TABLE users IN SHARE MODE")
        yield


def is_writer_waiting(stack: Stack) -> bool:
    return bool(
        stack.sql(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'velikiy writes' AND wait_event_type = 'Lock'"
        )
    )


class TestReplays:
    def test_repeated_request_gets_the_stored_response_and_is_carried_out_once(
        self, stack: Stack, base_url: str, key: str
    ) -> None:
        first = post(base_url, key, user_body(key))
        assert first.status_code == 201
        assert "Idempotency-Replayed" not in first.headers
        for other in (base_url, *stack.apps, *stack.edges):
            replayed = post(other, key, user_body(key))
            assert (replayed.status_code, replayed.content) == (201, first.content)
            for name in ("Location", "ETag", "Content-Type"):
                assert replayed.headers[name] == first.headers[name]
            assert replayed.headers["Idempotency-Replayed"] == "true"
            assert replayed.headers["X-Request-Id"] != first.headers["X-Request-Id"]
        assert count_users(stack, key) == 1

    def test_repeated_batch_gets_the_stored_response_byte_by_byte(self, stack: Stack, base_url: str, key: str) -> None:
        first = post(base_url, key, batch_body(key), "/users/batch")
        assert first.status_code == 200
        replayed = post(base_url, key, batch_body(key), "/users/batch")
        assert (replayed.status_code, replayed.content) == (200, first.content)
        assert replayed.headers["Idempotency-Replayed"] == "true"
        assert count_users(stack, key) == 3

    def test_request_with_other_spaces_and_another_order_of_members_is_a_repetition(
        self, stack: Stack, base_url: str, key: str
    ) -> None:
        email = f"{key}@example.com"
        for body in (f'{{"name":"Once","email":"{email}"}}', f' {{ "email" : "{email}",\n"name":"\\u004fnce" }} '):
            headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
            response = requests.post(f"{base_url}/users", data=body, headers=headers, timeout=5)
            assert response.status_code == 201
        assert count_users(stack, key) == 1

    def test_refusal_is_replayed_after_its_reason_is_gone(self, stack: Stack, base_url: str, key: str) -> None:
        first = requests.post(f"{base_url}/users", json=user_body(key), timeout=5)
        check_problem(post(base_url, key, user_body(key)), 409, "email")
        requests.delete(base_url + first.headers["Location"], timeout=5)
        replayed = post(base_url, key, user_body(key))
        check_problem(replayed, 409, "email")
        assert replayed.json()["type"] == "/problems/taken"
        assert replayed.headers["Idempotency-Replayed"] == "true"
        assert replayed.json()["request_id"] == replayed.headers["X-Request-Id"]
        assert count_users(stack, key) == 0

    def test_refusal_of_a_batch_is_replayed(self, stack: Stack, base_url: str, key: str) -> None:
        body = {"operations": [*batch_body(key)["operations"], {"op": "delete", "id": 999999999}]}
        responses = [post(base_url, key, body, "/users/batch") for _ in range(2)]
        for response in responses:
            check_problem(response, 409, "operations.3.id")
        assert [response.headers.get("Idempotency-Replayed") for response in responses] == [None, "true"]
        assert responses[0].json()["errors"] == responses[1].json()["errors"]
        assert count_users(stack, key) == 0

    def test_invalid_request_leaves_its_key_unused(self, base_url: str, key: str) -> None:
        check_problem(post(base_url, key, user_body(key, name="")), 422, "name")
        assert post(base_url, key, user_body(key)).status_code == 201


class TestMisuse:
    def test_key_with_another_body_is_422(self, stack: Stack, base_url: str, key: str) -> None:
        post(base_url, key, user_body(key))
        response = post(base_url, key, user_body(key, name="Twice"))
        check_problem(response, 422)
        assert response.json()["type"] == "/problems/key-reused"
        assert count_users(stack, key) == 1

    def test_key_at_another_address_is_422(self, stack: Stack, base_url: str, key: str) -> None:
        post(base_url, key, batch_body(key), "/users/batch")
        check_problem(post(base_url, key, user_body(key)), 422)
        assert count_users(stack, key) == 3

    @pytest.mark.parametrize("suffix", ["x" * 200, "!~", '"', "é".encode().hex(), "<b>'--%s"])
    def test_keys_that_differ_in_the_last_character_are_two_keys(
        self, stack: Stack, base_url: str, key: str, suffix: str
    ) -> None:
        assert post(base_url, key + suffix, user_body(key)).status_code == 201
        check_problem(post(base_url, key + suffix + "!", user_body(key)), 409, "email")
        assert post(base_url, key + suffix, user_body(key)).status_code == 201

    def test_request_with_two_keys_is_400(self, base_url: str, key: str) -> None:
        lines = f"Content-Type: application/json\r\nIdempotency-Key: {key}\r\nIdempotency-Key: {key}x\r\n".encode()
        check_raw_problem(
            send_request(base_url, "POST", "/users", lines, f'{{"name":"Once","email":"{key}@example.com"}}'.encode()),
            400,
        )


class TestInFlight:
    def test_one_of_many_concurrent_requests_with_a_key_is_carried_out(
        self, stack: Stack, base_url: str, key: str
    ) -> None:
        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(lambda _: post(base_url, key, user_body(key)), range(16)))
        assert {response.status_code for response in responses} <= {201, 409}
        assert (
            sum("Idempotency-Replayed" not in response.headers for response in responses if response.status_code == 201)
            == 1
        )
        for response in responses:
            if response.status_code == 409:
                assert response.json()["type"] == "/problems/in-flight"
                assert response.headers["Retry-After"] == "1"
        assert count_users(stack, key) == 1

    def test_key_of_a_request_in_flight_is_409(self, stack: Stack, base_url: str, key: str) -> None:
        with ThreadPoolExecutor(1) as pool:
            with inserts_blocked(stack):
                first = pool.submit(post, base_url, key, user_body(key))
                wait_until(lambda: is_writer_waiting(stack), every=0.01)
                for body in (user_body(key), user_body(key, name="Other")):
                    check_problem(post(stack.apps[1], key, body), 409)
            assert first.result().status_code == 201
        assert post(base_url, key, user_body(key)).headers["Idempotency-Replayed"] == "true"

    def test_write_that_was_rolled_back_stores_no_key_and_can_be_sent_again(
        self, stack: Stack, base_url: str, key: str
    ) -> None:
        with inserts_blocked(stack):
            check_problem(post(base_url, key, user_body(key)), 503)
        wait_until(lambda: not is_writer_waiting(stack))
        assert stack.sql("SELECT key FROM idempotency_keys WHERE key = %s", key) == []
        assert post(base_url, key, user_body(key)).status_code == 201
        assert count_users(stack, key) == 1


class TestCrashes:
    def test_app_that_dies_during_a_write_has_changed_nothing_and_the_key_can_be_used(self, own_stack: Stack) -> None:
        stack, key = own_stack, "dies"
        app = stack.apps[0]
        with ThreadPoolExecutor(1) as pool:
            with inserts_blocked(stack):
                first = pool.submit(post, app, key, user_body(key))
                wait_until(lambda: is_writer_waiting(stack), every=0.01)
                master = stack.pids()["app1"]
                for pid in (master, *children_of(master)):
                    os.kill(pid, signal.SIGKILL)
                assert isinstance(first.exception(10), requests.ConnectionError)
            wait_until(lambda: not is_writer_waiting(stack))
        wait_until(lambda: status_of(f"{app}/livez") == 200)
        assert count_users(stack, key) == 0
        assert post(app, key, user_body(key)).status_code == 201
        assert post(stack.edge, key, user_body(key)).headers["Idempotency-Replayed"] == "true"
        assert count_users(stack, key) == 1

    def test_client_that_lost_the_response_gets_it_for_the_repeated_request(self, stack: Stack, key: str) -> None:
        address = urlsplit(stack.edge)
        assert address.hostname and address.port
        body = f'{{"name":"Once","email":"{key}@example.com"}}'
        head = (
            "POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall((head + body).encode())
            wait_until(lambda: count_users(stack, key) == 1)
        replayed = post(stack.edges[1], key, user_body(key))
        assert (replayed.status_code, replayed.headers["Idempotency-Replayed"]) == (201, "true")
        assert count_users(stack, key) == 1


QUOTA = 20


@pytest.fixture(scope="module")
def limited() -> Iterator[Stack]:
    settings: Any = {"IDEMPOTENCY_QUOTA": str(QUOTA), "TRUSTED_PROXIES": "127.0.0.1", "APP_WORKERS": "1"}
    with running("--apps", "1", **settings) as stack:
        yield stack


class TestQuota:
    """Clients without an API key."""

    def post(self, stack: Stack, client: str, key: str) -> requests.Response:
        headers = {"Idempotency-Key": key, "X-Forwarded-For": client}
        return requests.post(f"{stack.edge}/users", json=user_body(key), headers=headers, timeout=10)

    def test_client_beyond_its_quota_is_refused_until_a_key_expires_and_others_are_not(self, limited: Stack) -> None:
        keys = [f"quota-{n}" for n in range(QUOTA)]
        assert {self.post(limited, "198.51.100.1", key).status_code for key in keys} == {201}
        refused = self.post(limited, "198.51.100.1", "one-more")
        check_problem(refused, 429)
        assert 86_300 < int(refused.headers["Retry-After"]) <= 86_400
        assert count_users(limited, "one-more") == 0
        assert self.post(limited, "198.51.100.1", keys[0]).headers["Idempotency-Replayed"] == "true"
        body = user_body("without-a-key")
        assert requests.post(f"{limited.edge}/users", json=body, timeout=5).status_code == 201
        assert self.post(limited, "198.51.100.2", "of-another").status_code == 201
        limited.sql("UPDATE idempotency_keys SET created_at = now() - interval '25 hours' WHERE key = %s", keys[3])
        wait_until(lambda: self.post(limited, "198.51.100.1", "one-more").status_code == 201, within=10)

    def test_client_that_has_changed_its_network_gets_the_response_to_its_first_try(self, limited: Stack) -> None:
        first = self.post(limited, "198.51.100.3", "moving")
        replayed = self.post(limited, "2001:db8::1", "moving")
        assert replayed.headers["Idempotency-Replayed"] == "true"
        assert replayed.content == first.content

    def test_address_of_a_client_is_not_stored(self, limited: Stack) -> None:
        self.post(limited, "198.51.100.4", "not-stored")
        [(owner,)] = limited.sql("SELECT owner FROM idempotency_keys WHERE key = 'not-stored'")
        assert re.fullmatch("~[0-9a-f]{32}", owner)


class TestExpiry:
    def test_key_is_forgotten_after_24_hours(self, stack: Stack, base_url: str, key: str) -> None:
        post(base_url, key, user_body(key))
        stack.sql("UPDATE idempotency_keys SET created_at = now() - interval '23 hours 59 minutes' WHERE key = %s", key)
        check_problem(post(base_url, key, user_body(key, name="Other")), 422)
        stack.sql("UPDATE idempotency_keys SET created_at = now() - interval '24 hours 1 second' WHERE key = %s", key)
        response = post(base_url, key, user_body("x" + key, name="Other"))
        try:
            assert response.status_code == 201
            assert "Idempotency-Replayed" not in response.headers
        finally:
            requests.delete(base_url + response.headers["Location"], timeout=5)

    def test_relay_deletes_expired_keys(self, stack: Stack, key: str) -> None:
        """There are more expired keys than the relay deletes in one statement."""
        stack.sql(
            "INSERT INTO idempotency_keys (key, request, response, created_at)"
            " SELECT %s || n, '', '{}', now() - interval '25 hours' FROM generate_series(1, 12000) n",
            key,
        )
        post(stack.edge, key, user_body(key))
        with refusing(stack, "relay"):
            pass  # the relay deletes expired keys at its start, and then once a minute
        wait_until(lambda: stack.sql("SELECT key FROM idempotency_keys WHERE key LIKE %s", f"{key}%") == [(key,)])
