"""The steps of one write on the wire: SQL, lock, drop in Redis, list of edges, drops at the edges, COMMIT, fill, response."""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import requests
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from testkit.failpoints import running_app
from testkit.stack import EDGE_SECRET, Stack, wait_until
from testkit.tcp_proxy import connection_to
from velikiy.coherence import connect
from velikiy.postgres import Database, pipeline
from velikiy.settings import Settings

Trace = list[tuple[str, str, bytes]]
"""Direction, server and bytes of each piece that passed, in order."""


@contextmanager
def tapped(server_name: str, address: tuple[str, int] | str, trace: Trace) -> Iterator[int]:
    """Yield a port that leads to the server, and record what passes.

    Bytes are recorded before they are passed on, so a later step that waited for a reply is recorded after that reply.
    """
    finished = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)

    def pump(client: socket.socket) -> None:
        with client, connection_to(address) as server, selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, (server, "to"))
            ready.register(server, selectors.EVENT_READ, (client, "from"))
            while not finished.is_set():
                for key, _ in ready.select(0.05):
                    other, direction = key.data
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    if not data:
                        return
                    trace.append((direction, server_name, data))
                    other.sendall(data)

    def accept() -> None:
        while not finished.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            threading.Thread(target=pump, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        finished.set()
        thread.join()
        listener.close()


class Step(NamedTuple):
    direction: str
    server: str
    pattern: bytes
    """The bytes by which the step is recognized."""

    name: str


STEPS = (
    Step("to", "postgres", b'UPDATE "users"', "SQL"),
    Step("to", "postgres", b"pg_advisory_xact_lock_shared", "lock"),
    Step("to", "redis", b"UNLINK", "drop in Redis"),
    Step("to", "redis", b"EVAL", "script in Redis"),
    Step("to", "postgres", b"kind = 'edge'", "list of edges"),
    Step("to", "edge", b"POST /drop", "drop at an edge"),
    Step("from", "edge", b" 204 ", "acknowledgement of an edge"),
    Step("to", "postgres", b"COMMIT", "COMMIT"),
    Step("from", "app", b"HTTP/1", "response"),
)


def step_names(trace: Trace) -> list[str]:
    names = []
    for direction, server, data in trace:
        steps = [
            step for step in STEPS if (step.direction, step.server) == (direction, server) and step.pattern in data
        ]
        for step in sorted(steps, key=lambda step: data.index(step.pattern)):  # a piece may contain several steps
            names += [step.name] * (data.count(step.pattern) if server == "redis" else 1)
    return names


@pytest.fixture
def edge_addresses(stack: Stack) -> Iterator[list[tuple[str, str]]]:
    """Names and addresses of the running edges' control listeners. The fixture restores them afterwards."""
    rows = stack.sql("SELECT name, address FROM caches WHERE kind = 'edge' AND fenced_at IS NULL")
    addresses = [(str(name), str(address)) for name, address in rows if is_listening(str(address))]
    yield addresses
    for name, address in addresses:
        stack.sql("UPDATE caches SET address = %s WHERE name = %s", address, name)


def is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_write_sends_its_steps_in_the_order_of_the_protocol(
    stack: Stack, edge_addresses: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(edge_addresses) == 2
    monkeypatch.setattr(pipeline, "MAX_PREPARED", 0)  # a prepared statement is only a number on the wire
    trace: Trace = []
    postgres = f"{conninfo_to_dict(stack.postgres)['host']}/.s.PGSQL.5432"
    with ExitStack() as context:
        postgres_port = context.enter_context(tapped("postgres", postgres, trace))
        redis_port = context.enter_context(tapped("redis", stack.redis_socket, trace))
        for name, address in edge_addresses:
            host, _, port = address.rpartition(":")
            edge_port = context.enter_context(tapped("edge", (host, int(port)), trace))
            stack.sql("UPDATE caches SET address = %s WHERE name = %s", f"127.0.0.1:{edge_port}", name)
        settings = Settings(
            database_url=make_conninfo(stack.postgres, host="127.0.0.1", port=postgres_port),
            redis_url=stack.redis_through(redis_port),
            edge_secret=EDGE_SECRET,
        )
        database = Database(settings.database_url, size=2, timeout=10)
        app = urlsplit(context.enter_context(running_app(connect(database, settings))))
        app_port = context.enter_context(tapped("app", (str(app.hostname), int(app.port or 0)), trace))
        context.callback(database.close)
        for number in range(2):  # the first write opens the connections and loads the scripts
            trace.clear()
            response = requests.put(
                f"http://127.0.0.1:{app_port}/users/3", json={"name": f"Traced {number}"}, timeout=10
            )
            assert response.status_code == 200
            wait_until(lambda: "response" in step_names(trace) and step_names(trace)[-2:].count("script in Redis") == 1)
    steps = step_names(trace)
    before_edges, at_edges, after_edges = steps[:6], steps[6:10], steps[10:]
    # Two drops for the list and the count; the script drops the user and returns the fill lease to the writer.
    assert before_edges == ["SQL", "lock", "drop in Redis", "drop in Redis", "script in Redis", "list of edges"]
    # Both edges are invalidated in parallel, and both have acknowledged before the next step.
    assert sorted(at_edges) == ["acknowledgement of an edge"] * 2 + ["drop at an edge"] * 2
    # The writer sends its prefill before the response, and does not wait for the reply.
    assert after_edges[0] == "COMMIT"
    assert sorted(after_edges[1:]) == ["response", "script in Redis"]
