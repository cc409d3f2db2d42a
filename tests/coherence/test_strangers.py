"""Strangers on the machine or in its networks: they cannot speak for an app, a writer or an edge."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests
from werkzeug import Request, Response
from werkzeug.serving import make_server

from testkit.api import is_hit
from testkit.failpoints import has_cache_lease, lease_ms, running_edge
from testkit.fake_app import fake_app, refused_by_edge
from testkit.inside import control_listener, signed_post
from testkit.stack import EDGE_SECRET, Stack, wait_until
from velikiy.coherence import CachePath, Caches, EdgeTier
from velikiy.coherence.host import HOST
from velikiy.coherence.membership import Cache
from velikiy.postgres import Database
from velikiy.signatures import HEADER, Signer
from velikiy.stack import local_http

OTHER_SECRET = "of-a-stranger-to-the-stack"
PATH = CachePath("/users/1", "user:1")


@contextmanager
def served(respond: Callable[[Request], Response]) -> Iterator[int]:
    """Serve these responses on a port, which is yielded."""
    server = make_server("127.0.0.1", 0, Request.application(respond), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join()


@contextmanager
def responding(response: bytes) -> Iterator[int]:
    """Send these bytes to each connection, whatever it asks, on a port that is yielded."""

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(response)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def registered(stack: Stack) -> list[tuple[str, str]]:
    return stack.sql("SELECT name, epoch FROM caches WHERE kind = 'edge' ORDER BY name")


class TestLeases:
    @pytest.mark.parametrize("target", ["/.lease/register", "/.lease/renew", "/.lease/resign"])
    def test_app_refuses_a_registration_without_the_secret(self, stack: Stack, target: str) -> None:
        """With the epoch of a stranger in its row, an edge would be served no drop for up to two leases."""
        wait_until(lambda: has_cache_lease(stack.edge))
        [(name, _), *_] = before = registered(stack)
        instance_id, _, address = name.partition("@")
        form = {"instance_id": instance_id, "epoch": "mine", "port": address.rpartition(":")[2]}
        assert requests.post(f"{stack.app}{target}", data=form, timeout=5).status_code == 404
        assert signed_post(stack.app, target, form, OTHER_SECRET).status_code == 404
        assert registered(stack) == before

    def test_app_refuses_a_signed_registration_with_another_body(self, stack: Stack) -> None:
        form = {"instance_id": "a/b", "epoch": "1", "port": "1"}
        signed, _ = Signer(EDGE_SECRET).sign_request(
            "POST", "/.lease/register", body="instance_id=a%2Fb&epoch=1&port=2"
        )
        response = requests.post(f"{stack.app}/.lease/register", data=form, headers={HEADER: signed}, timeout=5)
        assert response.status_code == 404

    def test_app_registers_no_host_at_which_another_program_answers(self, stack: Stack) -> None:
        """The address in a registration proves nothing: the edge has to sign an answer there."""
        with responding(b"HTTP/1.1 204 No Content\r\nSignature: 00\r\n\r\n") as port:
            form = {"instance_id": f"{HOST}/stranger", "epoch": "1", "host": "127.0.0.1", "port": str(port)}
            assert signed_post(stack.app, "/.lease/register", form).status_code == 424
        assert not [name for name, _ in registered(stack) if "stranger" in name]

    @pytest.mark.parametrize("secret", [None, OTHER_SECRET])
    def test_edge_takes_no_lease_from_a_program_on_the_port_of_an_app(self, secret: str | None) -> None:
        asked = threading.Semaphore(0)

        def grant(request: Request) -> Response:
            asked.release()
            body = "2400 - users:user"
            signer = Signer(secret or "")
            mac = request.headers[HEADER].partition(" ")[2]
            return Response(body, 200, {HEADER: signer.response_mac(mac, 200, body)} if secret else {})

        with served(grant) as port, running_edge(f"127.0.0.1:{port}") as (edge, _):
            for _ in range(3):
                assert asked.acquire(timeout=10)
            assert lease_ms(edge) == 0

    def test_edge_takes_no_lease_that_was_granted_for_an_earlier_request(self) -> None:
        kept: list[Response] = []
        with fake_app() as app:
            sign = app._lease

            def repeat(request: Request) -> Response:
                kept.append(sign(request))
                return kept[0]

            app._lease = repeat  # type: ignore[method-assign]
            wait_until(lambda: len(kept) > 2)
            wait_until(lambda: not has_cache_lease(app.edge))

    def test_caches_admit_at_most_max_edges(self, stack: Stack) -> None:
        database = Database(stack.postgres, size=1, timeout=2)
        database.open()
        there = len(registered(stack))
        caches = Caches(database, threads=1, max_edges=there + 1)
        try:
            assert caches.register("a/1", "192.0.2.1:1", "1")
            assert caches.register("a/2", "192.0.2.2:1", "2") is None
            assert caches.register("a/1", "192.0.2.1:1", "3")  # an edge that is registered may return
        finally:
            stack.forget_edges("name LIKE 'a/%%'")
            database.close()


class TestControlListener:
    @pytest.fixture
    def control(self) -> Iterator[str]:
        with fake_app() as app:
            requests.get(f"{app.edge}/rows/1", timeout=5)
            wait_until(lambda: is_hit(f"{app.edge}/rows/1"))
            yield control_listener(app.edge)
            assert is_hit(f"{app.edge}/rows/1")

    @pytest.mark.parametrize(
        ("method", "target", "body"),
        [
            ("POST", "/drop", "*"),
            ("GET", "/show", ""),
            ("GET", "/show?uri=/rows/1", ""),
            ("GET", "/close_connections", ""),
        ],
    )
    def test_edge_refuses_a_request_without_the_secret(self, control: str, method: str, target: str, body: str) -> None:
        signed, _ = Signer(OTHER_SECRET).sign_request(method, target, body=body)
        for headers in ({}, {HEADER: signed}, {HEADER: ""}, {HEADER: "0 0"}):
            response = requests.request(method, control + target, data=body, headers=headers, timeout=5)
            assert response.status_code == 401
            assert "lease" not in response.text

    def test_edge_answers_signed_requests_with_signed_responses(self) -> None:
        with fake_app() as app:
            assert "lease " in local_http.get_signed(f"{control_listener(app.edge)}/show", EDGE_SECRET)
            assert local_http.get_signed(f"{control_listener(app.edge)}/close_connections", EDGE_SECRET) == ""
            wait_until(lambda: requests.get(f"{app.edge}/rows/1", timeout=5).headers["Connection"] == "close")

    def test_edge_tells_a_client_nothing_about_itself(self) -> None:
        with fake_app() as app:
            response = requests.get(f"{app.edge}/.edge", timeout=5)
            other = requests.get(f"{app.edge}/.other", timeout=5)
        assert response.status_code == other.status_code == 404
        assert response.json()["detail"] == other.json()["detail"]


class TestDrops:
    @pytest.mark.parametrize(
        "response",
        [
            b"HTTP/1.1 204 No Content\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\nSignature: " + b"0" * 64 + b"\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\nSignature: "
            + Signer(EDGE_SECRET).response_mac("of another request", 204).encode()
            + b"\r\n\r\n",
        ],
    )
    def test_program_on_the_port_of_a_crashed_edge_acknowledges_no_drop(self, response: bytes) -> None:
        with responding(response) as port:
            edge = Cache(f"{HOST}/x@127.0.0.1:{port}", f"127.0.0.1:{port}", "1", fenced=False, excluded=False)
            assert EdgeTier(EDGE_SECRET).drop([edge], [PATH]) == [edge]
            assert not EdgeTier(EDGE_SECRET).reaches(edge)

    def test_writer_with_another_secret_gets_no_acknowledgement(self, stack: Stack) -> None:
        wait_until(lambda: has_cache_lease(stack.edge))
        [row] = stack.sql("SELECT name, address, epoch, false, false FROM caches WHERE kind = 'edge' LIMIT 1")
        assert EdgeTier(EDGE_SECRET).drop([Cache(*row)], [PATH]) == []
        assert EdgeTier(OTHER_SECRET).drop([Cache(*row)], [PATH]) == [Cache(*row)]


def test_edge_without_the_secret_refuses_to_start(tmp_path: Path) -> None:
    for secret in ("", "short"):
        assert "EDGE_SECRET" in refused_by_edge(EDGE_SECRET=secret, SECRETS_DIR=str(tmp_path))
