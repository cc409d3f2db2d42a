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
from collections import Counter
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
    """One connection to an edge, which carries one request at a time."""

    def __init__(self, edge: int, ended: "Callable[[Connection, int], None]") -> None:
        """
        Args:
            ended: Called with the status of each response, and with 0 once the connection is closed.
        """
        self.edge, self.ended = edge, ended
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = head.partition(b"Content-Length: ")[2]
        if end and (not length or len(body) >= int(length.split(b"\r\n")[0])):
            self.received = b""
            self.ended(self, int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        self.ended(self, 0)


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
    """Sends requests to the edges in turn. It takes CPU time from the service, so it has no task for each request."""

    def __init__(self, edges: list[str], make: Callable[[int], bytes]) -> None:
        self.addresses = [(str(url.hostname), int(url.port or 80)) for url in map(urlsplit, edges)]
        self.numbers = itertools.count()
        self.make = make
        self.idle: list[list[Connection]] = [[] for _ in edges]
        self.waiting: dict[Connection, float] = {}
        """The moment at which each request without a response was due; the oldest first."""

        self.connecting: set[asyncio.Task[None]] = set()
        self.phase = Phase(0)
        self.after_each: Callable[[], None] = lambda: None

    async def closed_loop(self, seconds: float) -> Phase:
        phase = self.phase = Phase(seconds)
        self.after_each = lambda: None if phase.is_over else self.send()
        for _ in range(CLOSED_CONNECTIONS):
            self.send()
        while not phase.is_over or self.waiting or self.connecting:
            await asyncio.sleep(TICK_S)
            self.give_up()
        return phase

    async def open_loop(self, seconds: float, rate: float) -> Phase:
        phase, sent = Phase(seconds), 0
        self.phase, self.after_each = phase, lambda: None
        while not phase.is_over or self.waiting or self.connecting:
            due = sent if phase.is_over else int((time.monotonic() - phase.began) * rate)
            for _ in range(sent, due):
                self.send()
            sent = due
            await asyncio.sleep(TICK_S)
            self.give_up()
        return phase

    def send(self) -> None:
        number, due = next(self.numbers), time.monotonic()
        edge = number % len(self.addresses)
        if self.idle[edge]:
            self.send_through(self.idle[edge].pop(), number, due)
        else:
            task = asyncio.create_task(self.connect(edge, number, due))
            self.connecting.add(task)
            task.add_done_callback(self.connecting.discard)

    async def connect(self, edge: int, number: int, due: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: Connection(edge, self.ended), *self.addresses[edge])
        except OSError:
            self.count("refused", due)
        else:
            self.send_through(connection, number, due)

    def send_through(self, connection: Connection, number: int, due: float) -> None:
        self.waiting[connection] = due
        connection.transport.write(self.make(number))

    def ended(self, connection: Connection, status: int) -> None:
        idle, due = self.idle[connection.edge], self.waiting.pop(connection, None)
        if due is not None:
            if status:
                idle.append(connection)
            self.count(str(status) if status else "closed", due)
        elif connection in idle:  # closed meanwhile
            idle.remove(connection)

    def give_up(self) -> None:
        """Give up the requests that have no response within PATIENCE_S."""
        since = time.monotonic() - PATIENCE_S
        for connection, due in list(itertools.takewhile(lambda it: it[1] < since, self.waiting.items())):
            del self.waiting[connection]
            connection.transport.abort()
            self.count("late", due)

    def count(self, outcome: str, due: float) -> None:
        self.phase.count(outcome, due)
        self.after_each()


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
