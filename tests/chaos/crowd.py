"""Clients that misbehave, in a process of their own so that they do not slow the clients that behave.

`python -m tests.chaos.crowd KIND COUNT ROW NAME EDGE...` runs COUNT clients of this kind, spread over the edges, until
its standard input ends. Then it prints how often each outcome occurred, as JSON. ROW is a user that the clients may
write; they give it names that begin with NAME.
"""

import asyncio
import itertools
import json
import os
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import ClassVar
from urllib.parse import urlsplit

BYTE_INTERVAL_S = 0.2
"""Between two bytes of a slow client."""

PAUSE_S = 0.1
"""Before a client connects again."""

ANSWER_S = 15.0
"""The longest wait for a response. A write may wait 10 s at the edge."""

NO_ANSWER = "without an answer"
"""The outcome of a request that has to be answered, and was not."""

PIPELINED = 50
DIFFERENT_QUERIES = 10_000
SMALL_BUFFER_BYTES = 4096


class Client:
    """A connection to an edge, and what the clients of all connections share."""

    numbers: ClassVar = itertools.count()
    outcomes: ClassVar[Counter[str]] = Counter()

    def __init__(self, host: str, port: int, row: int, name: str) -> None:
        self.host, self.port, self.row, self.name = host, port, row, name

    async def connect(self, *, buffer: int = 0, source: str = "") -> None:
        sock = socket.socket()
        sock.setblocking(False)
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        if source:
            sock.bind((source, 0))
        await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
        self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=1 << 20)

    async def receive(self) -> int:
        """Receive a response and return its status."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), ANSWER_S)).lower()
        status = int(head.split(b" ", 2)[1])
        length = head.partition(b"\r\ncontent-length: ")[2]
        if length and status not in (204, 304):
            await asyncio.wait_for(self.reader.readexactly(int(length.split(b"\r\n")[0])), ANSWER_S)
        return status

    async def exchange(self, request: bytes) -> int:
        self.writer.write(request)
        status = await self.receive()
        self.outcomes[str(status)] += 1
        return status

    async def expect(self, answered: Awaitable[int]) -> None:
        """Count the response as an outcome, also a missing response."""
        try:
            self.outcomes[str(await answered)] += 1
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            self.outcomes[NO_ANSWER] += 1

    async def trickle(self, beginning: bytes) -> None:
        self.writer.write(beginning)
        while not self.reader.at_eof():
            self.writer.write(b" ")
            with suppress(TimeoutError):
                if await asyncio.wait_for(self.reader.read(4096), BYTE_INTERVAL_S):
                    self.outcomes["answered"] += 1

    async def keep(self) -> None:
        """Wait until the edge closes the connection."""
        await self.reader.read()
        self.outcomes["closed by the edge"] += 1


def request(method: str, target: str, body: bytes = b"", field: str = "") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *([field] if field else [])]
    if body or method not in ("GET", "HEAD"):
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def update(client: Client, number: int, field: str = "") -> bytes:
    return request("PUT", f"/users/{client.row}", json.dumps({"name": f"{client.name}{number}"}).encode(), field)


async def slow_header(client: Client) -> None:
    await client.connect()
    await client.trickle(b"GET /users/1 HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")


async def slow_body(client: Client) -> None:
    await client.connect()
    head = f"PUT /users/{client.row} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    await client.trickle(head.encode() + b"Content-Length: 60000\r\n\r\n")


async def slow_reader(client: Client) -> None:
    """Request large responses and take a byte now and then."""
    await client.connect(buffer=SMALL_BUFFER_BYTES)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a transport of sockets
    client.writer.write(request("GET", "/openapi.json") * 2)
    sock = client.writer.get_extra_info("socket")
    while True:
        await asyncio.sleep(BYTE_INTERVAL_S)
        with suppress(BlockingIOError):
            if not os.read(sock.fileno(), 1):
                client.outcomes["closed by the edge"] += 1
                return


async def silent(client: Client) -> None:
    await client.connect()
    await client.keep()


async def idle(client: Client) -> None:
    await client.connect()
    await client.exchange(request("GET", "/users/1"))
    await client.keep()


async def half_closing_reader(client: Client) -> None:
    """Close the sending side behind the request. The answer has to come."""
    for target in ("/users/1", f"/users?limit={next(client.numbers) % 90 + 1}", "/readyz"):
        await client.connect()
        client.writer.write(request("GET", target))
        client.writer.write_eof()
        await client.expect(client.receive())
        client.writer.close()


async def resetting(client: Client) -> None:
    """Reset the connection in the middle of a body, or right behind it."""
    for half in (True, False):
        await client.connect()
        whole = update(client, next(client.numbers))
        client.writer.write(whole[: -10 if half else None])
        await client.writer.drain()
        sock = client.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.writer.transport.abort()
        client.outcomes["reset"] += 1


async def pipelining(client: Client) -> None:
    await client.connect()
    while True:
        targets = [f"/users/{random.randrange(1, 10)}" for _ in range(PIPELINED)]
        client.writer.write(b"".join(request("GET", target) for target in targets))
        for _ in targets:
            await client.expect(client.receive())
        await asyncio.sleep(PAUSE_S)


def repeating(*requests: Callable[[Client, int], bytes]) -> Callable[[Client], Awaitable[None]]:
    """Return a kind of client that sends these requests in turn, each as soon as the response before has arrived. The
    functions return the request of a number."""

    async def run(client: Client) -> None:
        await client.connect()
        while True:
            number = next(client.numbers)
            status = await client.exchange(requests[number % len(requests)](client, number))
            await asyncio.sleep(PAUSE_S if status in (429, 503) else 0)

    return run


def random_id() -> int:
    return random.randrange(10**6, 10**12)


def batch(client: Client, number: int) -> bytes:
    operation = {"op": "update", "id": client.row, "name": f"{client.name}{number}"}
    return request("POST", "/users/batch", json.dumps({"operations": [operation] * 50}).encode())


async def streaming(client: Client) -> None:
    await client.connect()
    client.writer.write(request("GET", "/console/live", field="Accept: text/event-stream"))
    while piece := await client.reader.read(65536):
        if piece.startswith(b"HTTP/1.1 "):
            client.outcomes[piece[9:12].decode()] += 1
    await asyncio.sleep(PAUSE_S)


async def garbage(client: Client) -> None:
    """Speak TLS, HTTP/2 without asking, or nothing known."""
    for beginning in (bytes.fromhex("16030100a5010000a10303") + os.urandom(160), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        await client.connect()
        client.writer.write(beginning)
        await client.keep()
    await client.connect()
    client.writer.write(os.urandom(2000) + b"\r\n\r\n")
    await client.keep()


async def beyond_its_rate(client: Client) -> None:
    """Send hits without a pause, from an address of its own."""
    await client.connect(source="127.0.0.2")
    many = request("GET", "/users/1") * PIPELINED
    while True:
        client.writer.write(many)
        for _ in range(PIPELINED):
            client.outcomes[str(await client.receive())] += 1


async def beyond_its_connections(client: Client) -> None:
    await client.connect(source="127.0.0.3")
    client.writer.write(b"GET /users/1 HTTP/1.1\r\nHost: localhost\r\nX-Half: ")
    await client.keep()


KINDS: dict[str, Callable[[Client], Awaitable[None]]] = {
    "slow-headers": slow_header,
    "slow-bodies": slow_body,
    "slow-readers": slow_reader,
    "silent": silent,
    "idle": idle,
    "half-closing": half_closing_reader,
    "resetting": resetting,
    "pipelining": pipelining,
    "unknown-ids": repeating(lambda client, n: request("GET", f"/users/{random_id()}")),
    "searches": repeating(
        lambda client, n: request("GET", f"/users?q=word{n}"),
        lambda client, n: request("GET", f"/users/count?q=a{n}"),
    ),
    "queries": repeating(
        lambda client, n: request("GET", f"/users?limit={n % 100 + 1}&email=a{n % DIFFERENT_QUERIES}@example.com")
    ),
    "huge-bodies": repeating(
        lambda client, n: request("POST", "/users/batch", b" " * 2_000_000),
        lambda client, n: request("PUT", f"/users/{client.row}", b" " * 10_000_000),
        lambda client, n: request("PUT", f"/users/{client.row}", b'{"name": "%b"}' % (b"x" * 65_000)),
    ),
    "one-row": repeating(
        lambda client, n: update(client, n, 'If-Match: "0"'),
        lambda client, n: update(client, n, "If-Match: *"),
        lambda client, n: request("DELETE", f"/users/{client.row}", field='If-Match: "0"'),
    ),
    "writing": repeating(update),
    "batches": repeating(batch),
    "histories": repeating(
        lambda client, n: request("GET", f"/users/{client.row if n % 2 else n % 50 + 1}/history?limit={n % 99 + 1}")
    ),
    "streams": streaming,
    "garbage": garbage,
    "if-none-match": repeating(
        lambda client, n: request("GET", "/users/1", field=f'If-None-Match: "{n}", "{n + 1}", W/"{n}"')
    ),
    "beyond-its-rate": beyond_its_rate,
    "beyond-its-connections": beyond_its_connections,
}


async def forever(kind: Callable[[Client], Awaitable[None]], client: Client) -> None:
    while True:
        try:
            await kind(client)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            client.outcomes[type(error).__name__] += 1
        finally:
            with suppress(AttributeError, OSError):
                client.writer.close()
        await asyncio.sleep(PAUSE_S)


async def main(kind: str, count: int, row: int, name: str, edges: list[str]) -> None:
    addresses = [urlsplit(edge) for edge in edges]
    tasks = []
    for number in range(count):
        address = addresses[number % len(addresses)]
        client = Client(str(address.hostname), int(address.port or 80), row, name)
        tasks.append(asyncio.create_task(forever(KINDS[kind], client)))
    await asyncio.to_thread(sys.stdin.read)
    pending = set(tasks)
    while pending:  # wait_for of Python 3.11 loses a cancellation that comes together with its result
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.5)
    print(json.dumps(Client.outcomes))


if __name__ == "__main__":
    kind, count, row, name, *edges = sys.argv[1:]
    asyncio.run(main(kind, int(count), int(row), name, edges))
