"""Tier 1 as a writer sees it: edges, each with a control listener that takes drops (edge/control.lua)."""

import http.client
from collections import defaultdict, deque
from collections.abc import Sequence
from urllib.parse import quote

import structlog

from velikiy.coherence.caches import PATIENCE, Cache
from velikiy.coherence.entry import Path

log = structlog.get_logger()

MANY = 1500
"""Paths. More than that do not fit into an edge's buffer (client_body_buffer_size 64k), and everything is dropped."""

AWAY = (OSError, http.client.HTTPException)


class EdgeTier:
    """Connections are kept, several to an edge where several writers are at work; threads may share this."""

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[http.client.HTTPConnection]] = defaultdict(deque)

    def drop(self, edges: Sequence[Cache], paths: Sequence[Path] | None) -> list[Cache]:
        """Forget these paths, or with None all of them, at each of these edges; those that do not answer.

        In parallel: all are asked before the first is listened to. Where nobody listens the edge is dead: it starts
        again with nothing.
        """
        body = "*" if paths is None or len(paths) > MANY else "\n".join(path.path for path in paths)
        drops = [_Drop(edge, body, self._connection(edge)) for edge in edges]
        for drop in drops:
            drop.ask()
        silent = []
        for drop in drops:
            if not drop.done():
                log.warning("edge.unavailable", cache=drop.edge.name, address=drop.edge.address)
                drop.connection.close()
                silent.append(drop.edge)
            elif drop.connection.sock is not None:
                self._idle[drop.edge.address].append(drop.connection)
        return silent

    def show(self, edge: Cache, uri: str) -> dict[str, str] | None:
        """For people: what the edge says of itself and of this address (edge/control.lua); None: no answer."""
        connection = self._connection(edge)
        try:
            connection.request("GET", f"/show?uri={quote(uri, safe='')}")
            answer = connection.getresponse()
            lines = answer.read().decode().splitlines()
        except AWAY:
            return None
        finally:
            connection.close()
        return dict(line.split(" ", 1) for line in lines) if answer.status == 200 else None

    def _connection(self, edge: Cache) -> http.client.HTTPConnection:
        try:
            return self._idle[edge.address].pop()
        except IndexError:
            host, _, port = edge.address.rpartition(":")
            return http.client.HTTPConnection(host.strip("[]"), int(port), timeout=PATIENCE)


class _Drop:
    """One drop at one edge."""

    def __init__(self, edge: Cache, body: str, connection: http.client.HTTPConnection) -> None:
        self.edge = edge
        self.body = body
        self.connection = connection
        self._kept = connection.sock is not None
        self._dead = False

    def ask(self) -> None:
        """What goes wrong here comes to light in `done`."""
        try:
            self.connection.request("POST", "/drop", self.body, {"X-Edge": self.edge.name})
        except ConnectionRefusedError:
            self._dead = True
            self.connection.close()
        except AWAY:
            self.connection.close()

    def done(self) -> bool:
        if self._dead:
            return True
        try:
            answer = self.connection.getresponse()
            answer.read()
        except AWAY as error:
            self.connection.close()
            if not self._kept or isinstance(error, TimeoutError):
                return False
            # Closed at the other end meanwhile: a new one tells who is there now. A path may be dropped twice.
            self._kept = False
            self.ask()
            return self.done()
        return answer.status == 204
