"""Connections to Redis for scripts, and no more of a client than that.

Gains: redis-py's own client takes several times longer for a command than Redis does.
Relies on: redis-py's connections, which keep addresses, passwords and TLS, and hiredis for the wire format.
Remove when: redis-py's client costs less than a tenth of a hit in Redis (`./run bench --only redis`).
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from velikiy.kernel_timeouts import Socket

SCRIPTS = Path(__file__).parent / "scripts"

Argument = str | bytes | int | Callable[[], str]
"""A callable is called again for each attempt."""


class Script:
    """A program for Redis: a file, named by its digest once Redis has loaded it."""

    def __init__(self, name: str) -> None:
        self.text = (SCRIPTS / f"{name}.lua").read_bytes()
        self.digest = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()

    def run(self, key: str, *arguments: Argument) -> tuple[Argument, ...]:
        return ("EVALSHA", self.digest, 1, key, *arguments)

    def load(self, key: str, *arguments: Argument) -> tuple[Argument, ...]:
        return ("EVAL", self.text, 1, key, *arguments)


READ, FILL, DROP = Script("read"), Script("fill"), Script("drop")


class TcpConnection(redis.Connection):
    """redis-py's class for plain TCP, with a socket whose timeout the kernel keeps."""

    def _connect(self) -> Socket:
        return Socket(super()._connect())  # type: ignore[no-untyped-call]


class Connections:
    """A pool of kept connections that threads share."""

    def __init__(self, url: str, timeout: float) -> None:
        """`timeout`: seconds to connect, and seconds to wait for a reply."""
        self.client = redis.Redis.from_url(
            url,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # the default retries for up to a minute; PostgreSQL is faster
        )
        self._idle: deque[Any] = deque()

    def exchange(self, *commands: tuple[Argument, ...]) -> list[Any]:
        """Send the commands together and return their replies.

        Raises:
            redis.exceptions.RedisError: also for an error reply, after all replies were read.
        """
        try:
            connection, kept = self._idle.pop(), True
        except IndexError:
            # The pool's own method counts the connections that it made, broken ones included, up to a hundred.
            pool = self.client.connection_pool
            kind = TcpConnection if pool.connection_class is redis.Connection else pool.connection_class
            connection, kept = kind(**pool.connection_kwargs), False
        try:
            _send(connection, commands)
            replies = _receive(connection, len(commands))
        except redis.exceptions.ConnectionError:
            if not kept:
                raise
            # A kept connection to a Redis that was restarted is broken; a new connection shows the present state. A
            # command that runs twice for this reason is a drop, or finds its fill lease gone.
            self._idle.clear()
            return self.exchange(*commands)
        self._idle.append(connection)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def run(self, script: Script, *calls: tuple[Any, ...], before: Sequence[tuple[Argument, ...]] = ()) -> list[Any]:
        """Run the script once for each call (a key, arguments) and return the results. The commands in `before`
        are sent first, in the same exchange."""
        try:
            return self.exchange(*before, *(script.run(*call) for call in calls))[len(before) :]
        except redis.exceptions.NoScriptError:
            return self.exchange(*(script.load(*call) for call in calls))


def _send(connection: Any, commands: tuple[tuple[Argument, ...], ...]) -> None:
    plain = [tuple(it() if callable(it) else it for it in command) for command in commands]
    encoded = [hiredis.pack_command(command) for command in plain]  # type: ignore[arg-type]  # its stub is too narrow
    connection.send_packed_command([b"".join(encoded)])


def _receive(connection: Any, count: int) -> list[Any]:
    replies: list[Any] = []
    for _ in range(count):
        try:
            replies.append(connection.read_response(disconnect_on_error=True))
        except redis.exceptions.ResponseError as error:
            replies.append(error)
    return replies


REFUSALS = {
    "WRONGPASS": "refuses the user or the password",
    "invalid username-password": "refuses the user or the password",
    "invalid password": "refuses the password",
    "AUTH failed": "refuses the password",
    "without any password configured": "has no password, but the address has one",
    "NOAUTH": "needs a password, which the address lacks",
    "Authentication required": "needs a password, which the address lacks",
    "HELLO must be called": "needs a password, which the address lacks",
    "DENIED": "is in protected mode and serves only its own machine",
    "protected mode": "is in protected mode and serves only its own machine",
    "READONLY": "is a replica that accepts no writes",
    "read only replica": "is a replica that accepts no writes",
    "NOPERM": "does not permit its user the commands or keys that this service needs",
    "no permissions": "does not permit its user the commands or keys that this service needs",
    "unknown command": "lacks a command that this service needs (renamed or switched off)",
    "DB index is out of range": "has no database of this number",
    "max number of clients": "has no room for further clients (maxclients)",
    "MOVED": "is a cluster, which this service cannot use",
    "CROSSSLOT": "is a cluster, which this service cannot use",
    "hash slot": "is a cluster, which this service cannot use",
    "CLUSTERDOWN": "is a cluster, which this service cannot use",
    "SSL": "does not speak TLS at this address, or its certificate is not trusted",
    "Protocol Error": "is no Redis: the server at this address speaks another protocol",
}
"""The reason for which a Redis refuses to serve, by a part of its message."""


def refusal(error: BaseException | None) -> str:
    """Return why a Redis that was reached refuses to serve, or an empty string if it did not answer."""
    while error is not None:
        for part, sentence in REFUSALS.items():
            if part.lower() in str(error).lower():
                return sentence
        error = error.__cause__ or error.__context__
    return ""


def refused(error: BaseException | None) -> bool:
    """Return whether the connection was refused, so that no server listens there. No other error proves that a server
    holds nothing: a server that resets a connection, or has no room for it, may hold anything."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False
