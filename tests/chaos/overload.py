"""Twice the load that the service can carry, from a process of its own.

`python -m tests.chaos.overload KIND SECONDS NAME EDGE... [-- ROW...]` measures the peak with a closed loop, each client
sending its next request when it has a response. Then it offers twice as many requests, each when it is due, whether or
not the earlier ones were answered (an open loop), and gives each up after a second. It prints both as JSON.
"""

import asyncio
import itertools
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

CLOSED_CONNECTIONS = 32
FACTOR = 2
PATIENCE_S = 1.0
"""A client gives up after so long. Only what is answered before counts."""

TICK_S = 0.005
WARMUP = 0.25
"""The share of each phase that is not counted."""


class Connection(asyncio.Protocol):
    """One connection, which carries one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answered: Callable[[Connection, int], None] | None = None
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, request: bytes, answered: "Callable[[Connection, int], None]") -> None:
        assert self.transport
        self.answered = answered
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = head.partition(b"Content-Length: ")[2]
        if end and (not length or len(body) >= int(length.split(b"\r\n")[0])):
            self.received = b""
            self._finish(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._finish(0)

    def close(self) -> None:
        self.answered = None
        if self.transport:
            self.transport.abort()

    def _finish(self, status: int) -> None:
        answered, self.answered = self.answered, None
        if answered:
            answered(self, status)


@dataclass
class Phase:
    """The requests of one phase, and how they ended."""

    seconds: float
    began: float = field(default_factory=time.monotonic)
    outcomes: Counter[str] = field(default_factory=Counter)

    def count(self, outcome: str, sent: float) -> None:
        """Count a request, unless it was sent during the warm-up."""
        if sent - self.began >= self.seconds * WARMUP:
            self.outcomes[outcome] += 1

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self.began > self.seconds

    @property
    def goodput(self) -> float:
        """Requests that were carried out in time, in a second."""
        return self.outcomes["200"] / (self.seconds * (1 - WARMUP))


class Generator:
    def __init__(self, edges: list[str], make: Callable[[int], bytes]) -> None:
        self.addresses = [(str(url.hostname), int(url.port or 80)) for url in map(urlsplit, edges)]
        self.numbers = itertools.count()
        self.make = make
        self.idle: list[deque[Connection]] = [deque() for _ in edges]

    def request(self) -> bytes:
        return self.make(next(self.numbers))

    async def connected(self, edge: int) -> Connection:
        while self.idle[edge]:
            connection = self.idle[edge].pop()
            if connection.transport:
                return connection
        _, protocol = await asyncio.get_running_loop().create_connection(Connection, *self.addresses[edge])
        return protocol

    async def exchange(self, phase: Phase, number: int) -> None:
        edge = number % len(self.addresses)
        sent = time.monotonic()
        done = asyncio.get_running_loop().create_future()
        try:
            connection = await self.connected(edge)
        except OSError:
            phase.count("refused", sent)
            return

        def answered(connection: Connection, status: int) -> None:
            if not done.done():
                done.set_result(status)

        connection.send(self.request(), answered)
        try:
            status = await asyncio.wait_for(done, PATIENCE_S - (time.monotonic() - sent))
        except TimeoutError:
            connection.close()
            phase.count("late", sent)
            return
        if connection.transport:
            self.idle[edge].append(connection)
        phase.count(str(status) if status else "closed", sent)

    async def closed_loop(self, seconds: float) -> Phase:
        phase = Phase(seconds)

        async def client(number: int) -> None:
            while not phase.is_over:
                await self.exchange(phase, number)

        await asyncio.gather(*(client(number) for number in range(CLOSED_CONNECTIONS)))
        return phase

    async def open_loop(self, seconds: float, rate: float) -> Phase:
        phase, sent = Phase(seconds), 0
        tasks: set[asyncio.Task[None]] = set()
        while not phase.is_over:
            due = int((time.monotonic() - phase.began) * rate)
            for number in range(sent, due):
                task = asyncio.create_task(self.exchange(phase, number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            sent = due
            await asyncio.sleep(TICK_S)
        await asyncio.gather(*tasks)
        return phase


def miss(number: int) -> bytes:
    """A read that no cache answers."""
    return (
        f"GET /users?limit=5&email=a{time.time_ns()}.{number}@example.com HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    )


def write(rows: list[str], name: str) -> Callable[[int], bytes]:
    def make(number: int) -> bytes:
        body = json.dumps({"name": f"{name}{number}"})
        head = (
            f"PUT /users/{rows[number % len(rows)]} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()

    return make


async def main(kind: str, seconds: float, name: str, edges: list[str], rows: list[str]) -> None:
    generator = Generator(edges, miss if kind == "reads" else write(rows, name))
    peak = await generator.closed_loop(seconds)
    overloaded = await generator.open_loop(seconds, FACTOR * peak.goodput)
    print(
        json.dumps(
            {
                "peak": round(peak.goodput),
                "goodput": round(overloaded.goodput),
                "ratio": round(overloaded.goodput / max(1, peak.goodput), 2),
                "outcomes at the peak": peak.outcomes,
                "outcomes": overloaded.outcomes,
            }
        )
    )


if __name__ == "__main__":
    kind, seconds, name, *others = sys.argv[1:]
    split = others.index("--") if "--" in others else len(others)
    asyncio.run(main(kind, float(seconds), name, others[:split], others[split + 1 :]))
