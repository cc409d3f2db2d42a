"""One write, as it goes over the wire: lock, SQL, drop in Redis, list of edges, drops at the edges, COMMIT, fill, response."""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import pytest
import requests
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from testkit.failpoints import running_app
from testkit.stack import Stack, wait_until
from velikiy.coherence import connect
from velikiy.postgres import Database, pipeline
from velikiy.settings import Settings

Trace = list[tuple[str, str, bytes]]


@contextmanager
def tapped(name: str, host: str, port: int, trace: Trace) -> Iterator[int]:
    """A port that leads there. What passes is noted before it is passed on, so that a later step, which waited for
    an response, is noted later."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)

    def carry(client: socket.socket) -> None:
        with client, socket.create_connection((host, port)) as server, selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, (server, "to"))
            ready.register(server, selectors.EVENT_READ, (client, "from"))
            while not over.is_set():
                for key, _ in ready.select(0.05):
                    other, direction = key.data
                    piece = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    if not piece:
                        return
                    trace.append((direction, name, piece))
                    other.sendall(piece)

    def accept() -> None:
        while not over.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            threading.Thread(target=carry, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        over.set()
        thread.join()
        listener.close()


WORDS = (
    ("to", "postgres", b'UPDATE "users"', "SQL"),
    ("to", "postgres", b"pg_advisory_xact_lock_shared", "lock"),
    ("to", "redis", b"UNLINK", "drop in Redis"),
    ("to", "redis", b"EVAL", "script in Redis"),
    ("to", "postgres", b"kind = 'edge'", "list of edges"),
    ("to", "edge", b"POST /drop", "drop at an edge"),
    ("from", "edge", b" 204 ", "an edge has dropped"),
    ("to", "postgres", b"COMMIT", "COMMIT"),
    ("from", "app", b"HTTP/1", "response"),
)


def words(trace: Trace) -> list[str]:
    said = []
    for direction, name, piece in trace:
        found = [it for it in WORDS if it[:2] == (direction, name) and it[2] in piece]
        for _, who, sign, word in sorted(found, key=lambda it: piece.index(it[2])):  # one piece may hold several
            said += [word] * (piece.count(sign) if who == "redis" else 1)
    return said


@pytest.fixture
def own_addresses(stack: Stack) -> Iterator[list[tuple[str, str]]]:
    """Of the edges' control listeners; put back afterwards."""
    rows = stack.sql("SELECT name, address FROM caches WHERE kind = 'edge' AND fenced_at IS NULL")
    found = [(str(name), str(address)) for name, address in rows if listens(str(address))]
    yield found
    for name, address in found:
        stack.sql("UPDATE caches SET address = %s WHERE name = %s", address, name)


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_a_write_goes_through_its_steps_in_order(
    stack: Stack, own_addresses: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(own_addresses) == 2
    monkeypatch.setattr(pipeline, "MAX_PREPARED", 0)  # a statement that was parsed before is a number on the wire
    trace: Trace = []
    dsn, redis = conninfo_to_dict(stack.postgres), urlsplit(stack.redis_url)
    with ExitStack() as context:
        postgres_port = context.enter_context(tapped("postgres", str(dsn["host"]), int(dsn["port"] or 0), trace))
        redis_port = context.enter_context(tapped("redis", str(redis.hostname), int(redis.port or 0), trace))
        for name, address in own_addresses:
            host, _, port = address.rpartition(":")
            edge_port = context.enter_context(tapped("edge", host, int(port), trace))
            stack.sql("UPDATE caches SET address = %s WHERE name = %s", f"127.0.0.1:{edge_port}", name)
        settings = Settings(
            database_url=make_conninfo(stack.postgres, host="127.0.0.1", port=postgres_port),
            redis_url=f"redis://:{redis.password}@127.0.0.1:{redis_port}/0",
        )
        database = Database(settings.database_url, size=2, timeout=10)
        url = context.enter_context(running_app(connect(database, settings)))
        app = urlsplit(url)
        app_port = context.enter_context(tapped("app", str(app.hostname), int(app.port or 0), trace))
        context.callback(database.close)
        for number in range(2):  # the first one makes the connections and loads the scripts
            trace.clear()
            response = requests.put(
                f"http://127.0.0.1:{app_port}/users/3", json={"name": f"Traced {number}"}, timeout=10
            )
            assert response.status_code == 200
            wait_until(lambda: "response" in words(trace) and words(trace)[-2:].count("script in Redis") == 1)
    said = words(trace)
    before, edges, after = said[:6], said[6:10], said[10:]
    # The list and the count; then the user, of whom the writer gets the lease.
    assert before == ["lock", "SQL", "drop in Redis", "drop in Redis", "script in Redis", "list of edges"]
    # Both are asked at the same time, and have both answered before anything else is done.
    assert sorted(edges) == ["an edge has dropped", "an edge has dropped", "drop at an edge", "drop at an edge"]
    # The writer's own fill is sent before the response, and not waited for.
    assert after[0] == "COMMIT"
    assert sorted(after[1:]) == ["response", "script in Redis"]
