"""A request with an Idempotency-Key is done once, whoever dies in between, and what came of it is told again."""

import os
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
from testkit.raw_http import ask, check
from testkit.stack import Stack, children_of, status_of, wait_until


@pytest.fixture
def key(stack: Stack) -> Iterator[str]:
    """One that nobody has used; what was made with it goes."""
    name = str(uuid.uuid4())
    yield name
    for edge in stack.edges[:1]:
        for (user,) in stack.sql("SELECT id FROM users WHERE email LIKE %s", f"{name}%"):
            requests.delete(f"{edge}/users/{user}", timeout=5)
    stack.sql("DELETE FROM idempotency_keys WHERE key LIKE %s", f"{name}%")


def new(key: str, **more: str) -> dict[str, str]:
    return {"name": "Once", "email": f"{key}@example.com", **more}


def post(base_url: str, key: str, body: dict[str, Any], path: str = "/users") -> requests.Response:
    return requests.post(base_url + path, json=body, headers={"Idempotency-Key": key}, timeout=10)


def users(stack: Stack, key: str) -> int:
    return int(stack.sql("SELECT count(*) FROM users WHERE email LIKE %s", f"{key}%")[0][0])


def batch_of(key: str, count: int = 3) -> dict[str, Any]:
    return {"operations": [{"op": "create", "name": "Once", "email": f"{key}{n}@example.com"} for n in range(count)]}


@contextmanager
def writes_held(stack: Stack) -> Iterator[None]:
    """Whoever inserts a user waits."""
    with psycopg.connect(stack.postgres) as connection:
        connection.execute("LOCK TABLE users IN SHARE MODE")
        yield


def waiting(stack: Stack) -> bool:
    return bool(
        stack.sql(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'velikiy writes' AND wait_event_type = 'Lock'"
        )
    )


class TestReplays:
    def test_the_same_request_has_the_same_answer_and_is_done_once(self, stack: Stack, base_url: str, key: str) -> None:
        first = post(base_url, key, new(key))
        assert first.status_code == 201
        assert "Idempotency-Replayed" not in first.headers
        for other in (base_url, *stack.apps, *stack.edges):
            again = post(other, key, new(key))
            assert (again.status_code, again.content) == (201, first.content)
            for name in ("Location", "ETag", "Content-Type"):
                assert again.headers[name] == first.headers[name]
            assert again.headers["Idempotency-Replayed"] == "true"
            assert again.headers["X-Request-Id"] != first.headers["X-Request-Id"]
        assert users(stack, key) == 1

    def test_so_has_a_batch_byte_by_byte(self, stack: Stack, base_url: str, key: str) -> None:
        first = post(base_url, key, batch_of(key), "/users/batch")
        assert first.status_code == 200
        again = post(base_url, key, batch_of(key), "/users/batch")
        assert (again.status_code, again.content) == (200, first.content)
        assert again.headers["Idempotency-Replayed"] == "true"
        assert users(stack, key) == 3

    def test_spaces_and_the_order_of_members_make_no_other_request(self, stack: Stack, base_url: str, key: str) -> None:
        email = f"{key}@example.com"
        for body in (f'{{"name":"Once","email":"{email}"}}', f' {{ "email" : "{email}",\n"name":"\\u004fnce" }} '):
            headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
            response = requests.post(f"{base_url}/users", data=body, headers=headers, timeout=5)
            assert response.status_code == 201
        assert users(stack, key) == 1

    def test_a_refusal_is_told_again_although_it_would_not_be_refused_now(
        self, stack: Stack, base_url: str, key: str
    ) -> None:
        first = requests.post(f"{base_url}/users", json=new(key), timeout=5)
        check_problem(post(base_url, key, new(key)), 409, "email")
        requests.delete(base_url + first.headers["Location"], timeout=5)
        again = post(base_url, key, new(key))
        check_problem(again, 409, "email")
        assert again.json()["type"] == "/problems/taken"
        assert again.headers["Idempotency-Replayed"] == "true"
        assert again.json()["request_id"] == again.headers["X-Request-Id"]
        assert users(stack, key) == 0

    def test_so_is_that_of_a_batch(self, stack: Stack, base_url: str, key: str) -> None:
        body = {"operations": [*batch_of(key)["operations"], {"op": "delete", "id": 999999999}]}
        responses = [post(base_url, key, body, "/users/batch") for _ in range(2)]
        for response in responses:
            check_problem(response, 409, "operations.3.id")
        assert [response.headers.get("Idempotency-Replayed") for response in responses] == [None, "true"]
        assert responses[0].json()["errors"] == responses[1].json()["errors"]
        assert users(stack, key) == 0

    def test_what_was_never_begun_is_not_remembered(self, base_url: str, key: str) -> None:
        check_problem(post(base_url, key, new(key, name="")), 422, "name")
        assert post(base_url, key, new(key)).status_code == 201


class TestMisuse:
    def test_a_key_with_another_body_is_422(self, stack: Stack, base_url: str, key: str) -> None:
        post(base_url, key, new(key))
        response = post(base_url, key, new(key, name="Twice"))
        check_problem(response, 422)
        assert response.json()["type"] == "/problems/key-reused"
        assert users(stack, key) == 1

    def test_so_it_is_at_another_address(self, stack: Stack, base_url: str, key: str) -> None:
        post(base_url, key, batch_of(key), "/users/batch")
        check_problem(post(base_url, key, new(key)), 422)
        assert users(stack, key) == 3

    @pytest.mark.parametrize("suffix", ["x" * 200, "!~", '"', "é".encode().hex(), "<b>'--%s"])
    def test_keys_are_told_apart_to_the_last_character(
        self, stack: Stack, base_url: str, key: str, suffix: str
    ) -> None:
        assert post(base_url, key + suffix, new(key)).status_code == 201
        check_problem(post(base_url, key + suffix + "!", new(key)), 409, "email")
        assert post(base_url, key + suffix, new(key)).status_code == 201

    def test_two_keys_are_none(self, base_url: str, key: str) -> None:
        lines = f"Content-Type: application/json\r\nIdempotency-Key: {key}\r\nIdempotency-Key: {key}x\r\n".encode()
        check(ask(base_url, "POST", "/users", lines, f'{{"name":"Once","email":"{key}@example.com"}}'.encode()), 400)


class TestInFlight:
    def test_of_two_at_once_one_is_done(self, stack: Stack, base_url: str, key: str) -> None:
        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(lambda _: post(base_url, key, new(key)), range(16)))
        assert {response.status_code for response in responses} <= {201, 409}
        assert (
            sum("Idempotency-Replayed" not in response.headers for response in responses if response.status_code == 201)
            == 1
        )
        for response in responses:
            if response.status_code == 409:
                assert response.json()["type"] == "/problems/in-flight"
                assert response.headers["Retry-After"] == "1"
        assert users(stack, key) == 1

    def test_while_the_first_is_being_carried_out_the_second_is_409(
        self, stack: Stack, base_url: str, key: str
    ) -> None:
        with ThreadPoolExecutor(1) as pool:
            with writes_held(stack):
                first = pool.submit(post, base_url, key, new(key))
                wait_until(lambda: waiting(stack), every=0.01)
                for body in (new(key), new(key, name="Other")):
                    check_problem(post(stack.apps[1], key, body), 409)
            assert first.result().status_code == 201
        assert post(base_url, key, new(key)).headers["Idempotency-Replayed"] == "true"

    def test_a_write_whose_outcome_is_unknown_can_be_sent_again(self, stack: Stack, base_url: str, key: str) -> None:
        with writes_held(stack):
            check_problem(post(base_url, key, new(key)), 503)
        wait_until(lambda: not waiting(stack))
        assert post(base_url, key, new(key)).status_code == 201
        assert users(stack, key) == 1


class TestCrashes:
    def test_an_app_that_dies_while_it_writes_has_done_nothing(self, own_stack: Stack) -> None:
        stack, key = own_stack, "dies"
        app = stack.apps[0]
        with ThreadPoolExecutor(1) as pool:
            with writes_held(stack):
                first = pool.submit(post, app, key, new(key))
                wait_until(lambda: waiting(stack), every=0.01)
                master = stack.pids()["app1"]
                for pid in (master, *children_of(master)):
                    os.kill(pid, signal.SIGKILL)
                assert isinstance(first.exception(10), requests.ConnectionError)
            wait_until(lambda: not waiting(stack))
        wait_until(lambda: status_of(f"{app}/livez") == 200)
        assert users(stack, key) == 0
        assert post(app, key, new(key)).status_code == 201
        assert post(stack.edge, key, new(key)).headers["Idempotency-Replayed"] == "true"
        assert users(stack, key) == 1

    def test_who_did_not_hear_the_answer_hears_it_when_asking_again(self, stack: Stack, key: str) -> None:
        address = urlsplit(stack.edge)
        assert address.hostname and address.port
        body = f'{{"name":"Once","email":"{key}@example.com"}}'
        head = (
            "POST /users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall((head + body).encode())
            wait_until(lambda: users(stack, key) == 1)
        again = post(stack.edges[1], key, new(key))
        assert (again.status_code, again.headers["Idempotency-Replayed"]) == (201, "true")
        assert users(stack, key) == 1

    def test_what_is_rolled_back_leaves_no_key(self, stack: Stack, base_url: str, key: str) -> None:
        with writes_held(stack):
            check_problem(post(base_url, key, new(key)), 503)
        wait_until(lambda: not waiting(stack))
        assert stack.sql("SELECT key FROM idempotency_keys WHERE key = %s", key) == []


class TestExpiry:
    def test_after_a_day_a_key_is_new_again(self, stack: Stack, base_url: str, key: str) -> None:
        post(base_url, key, new(key))
        stack.sql("UPDATE idempotency_keys SET created_at = now() - interval '23 hours 59 minutes' WHERE key = %s", key)
        check_problem(post(base_url, key, new(key, name="Other")), 422)
        stack.sql("UPDATE idempotency_keys SET created_at = now() - interval '24 hours 1 second' WHERE key = %s", key)
        response = post(base_url, key, new("x" + key, name="Other"))
        try:
            assert response.status_code == 201
            assert "Idempotency-Replayed" not in response.headers
        finally:
            requests.delete(base_url + response.headers["Location"], timeout=5)

    def test_the_relay_forgets_what_nobody_can_ask_for(self, stack: Stack, key: str) -> None:
        """More than it forgets at once, too."""
        stack.sql(
            "INSERT INTO idempotency_keys (key, request, answer, created_at)"
            " SELECT %s || n, '', '{}', now() - interval '25 hours' FROM generate_series(1, 12000) n",
            key,
        )
        post(stack.edge, key, new(key))
        with refusing(stack, "relay"):
            pass  # it looks when it starts, and each minute from then on
        wait_until(lambda: stack.sql("SELECT key FROM idempotency_keys WHERE key LIKE %s", f"{key}%") == [(key,)])
