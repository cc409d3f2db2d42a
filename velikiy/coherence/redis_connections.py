"""Connections to Redis for scripts, and no more of a client than that.

Gains: redis-py's own client takes several times longer for a command than Redis does.
Relies on: redis-py's connections, which keep addresses, passwords and TLS, and hiredis for the wire format.
Remove when: redis-py's client costs less than a tenth of a hit in Redis (`./run bench --only redis`).
"""

import hashlib
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from velikiy import names, traces
from velikiy.coherence.host import HOST, PROCESSES, process_has_ended, start_of_process
from velikiy.coherence.shards import Server, ShardMap
from velikiy.kernel_timeouts import Socket
from velikiy.settings import is_loopback

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


class OtherServer(Exception):
    """The connection leads to a server other than the expected one. Nothing was sent to it."""

    def __init__(self, found: ShardMap) -> None:
        self.found = found


class NamedConnection(redis.Connection):
    """redis-py's class for TCP, whose timeout also covers the look-up of the name."""

    def _connect(self) -> socket.socket:
        name, connect_to_host = self.host, super()._connect

        def connect(address: str) -> socket.socket:
            self.host = address
            return cast(socket.socket, connect_to_host())  # type: ignore[no-untyped-call]

        try:
            return names.first_connected(name, self.socket_connect_timeout or 1.0, connect)
        finally:
            self.host = name


class TlsConnection(redis.SSLConnection, NamedConnection):
    """The same with TLS. The certificate is checked for the name."""


class TcpConnection(NamedConnection):
    """The same without TLS, with a socket whose timeout the kernel keeps."""

    def _connect(self) -> Socket:
        return Socket(super()._connect())


class UnixConnection(redis.UnixDomainSocketConnection):
    """The same for a Unix socket."""

    def _connect(self) -> Socket:
        return Socket(super()._connect())  # type: ignore[no-untyped-call]


OWN_CLASSES = {
    redis.Connection: TcpConnection,
    redis.SSLConnection: TlsConnection,
    redis.UnixDomainSocketConnection: UnixConnection,
}


class Connections:
    """A pool of kept connections that threads share."""

    def __init__(self, url: str, timeout: float, *, direct: bool = False) -> None:
        """
        Args:
            timeout: Seconds to connect, and seconds to wait for a reply.
            direct: Only the Redis at this address can answer there or refuse a connection.
        """
        self.client = redis.Redis.from_url(
            url,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # the default retries for up to a minute; PostgreSQL is faster
            driver_info=None,  # two exchanges less for each connection
        )
        self.place, self._notices_end = _place(self.client.connection_pool.connection_kwargs, direct)
        """Where the server is, and whether this process notices there that it has ended."""
        self._is_at_socket = "path" in self.client.connection_pool.connection_kwargs
        self._idle: deque[tuple[Any, Server]] = deque()

    def exchange(self, *commands: tuple[Argument, ...], at: str | None = None) -> list[Any]:
        """Send the commands together and return their replies.

        Args:
            at: The id of the only server that they may be sent to.

        Raises:
            OtherServer
            redis.exceptions.RedisError: also for an error reply, after all replies were read.
        """
        return self.receive(self.send(*commands, at=at))

    def send(self, *commands: tuple[Argument, ...], at: str | None = None) -> "Sent":
        """Send the commands without waiting for their replies.

        Raises:
            OtherServer
            redis.exceptions.RedisError
        """
        try:
            (connection, server), kept = self._idle.pop(), True
        except IndexError:
            (connection, server), kept = self._connect(), False
        if at is not None and server.id != at:
            connection.disconnect()
            if not kept:
                raise OtherServer(ShardMap.plain(server))
            self.close_idle()  # the address may lead to another server by now
            return self.send(*commands, at=at)
        try:
            _send(connection, commands)
        except redis.exceptions.ConnectionError:
            if not kept:
                raise
            self.close_idle()
            return self.send(*commands, at=at)
        return Sent(connection, server, kept, commands, at)

    def receive(self, sent: "Sent", until: float | None = None) -> list[Any]:
        """Return the replies.

        Args:
            until: The moment (`time.monotonic`) to wait for, if it is not the usual timeout after each command.

        Raises:
            OtherServer
            redis.exceptions.RedisError
        """
        connection = sent.connection
        try:
            with traces.span("Redis", sent.description):
                replies = _receive(connection, len(sent.commands), until)
        except redis.exceptions.ConnectionError:
            if not sent.kept:
                raise
            # A kept connection to a Redis that was restarted is broken; a new connection shows the present state. A
            # command that runs twice for this reason is a drop, or finds its fill lease gone.
            self.close_idle()
            return self.receive(self.send(*sent.commands, at=sent.at), until)
        self._idle.append((connection, sent.server))
        return _without_errors(replies)

    def run(
        self,
        script: Script,
        *calls: tuple[Any, ...],
        before: Sequence[tuple[Argument, ...]] = (),
        at: str | None = None,
    ) -> list[Any]:
        """Run the script once for each call (a key, arguments) and return the results. The commands in `before`
        are sent first, in the same exchange."""
        return self.results(self.start(script, *calls, before=before, at=at), script, *calls)

    def start(
        self,
        script: Script,
        *calls: tuple[Any, ...],
        before: Sequence[tuple[Argument, ...]] = (),
        at: str | None = None,
    ) -> "Sent":
        """Send the first half of `run`."""
        return self.send(*before, *(script.run(*call) for call in calls), at=at)

    def results(self, sent: "Sent", script: Script, *calls: tuple[Any, ...], until: float | None = None) -> list[Any]:
        """Return the results of what `start` has sent."""
        try:
            replies = self.receive(sent, until)
        except redis.exceptions.NoScriptError:
            return self.receive(self.send(*(script.load(*call) for call in calls), at=sent.at), until)
        return replies[len(replies) - len(calls) :]

    def identify(self) -> Server:
        """Return the server that answers at this address now.

        Raises:
            redis.exceptions.RedisError
        """
        connection, server = self._connect()
        connection.disconnect()
        return server

    def facts(self, *cluster_commands: tuple[Argument, ...]) -> "Facts":
        """Return what the server at this address reports, be it a primary, a replica or a Sentinel. A node of a
        cluster also gets the commands.

        Raises:
            redis.exceptions.RedisError
        """
        with self._opened() as connection:
            facts = self._facts(connection)
            return facts._replace(replies=_exchange(connection, *cluster_commands)) if facts.is_cluster else facts

    def server(self, facts: "Facts") -> Server:
        """Return the server that has reported these facts.

        Raises:
            redis.exceptions.RedisError: The server cannot be used as Redis.
        """
        number = self.client.connection_pool.connection_kwargs.get("db") or 0
        return Server(f"{_run(facts.members)}/{number}", facts.place)

    def command(self, *commands: tuple[Argument, ...]) -> list[Any]:
        """Send commands on a connection of their own, whatever answers there: a Sentinel is no server for keys.

        Raises:
            redis.exceptions.RedisError
        """
        with self._opened() as connection:
            return _exchange(connection, *commands)

    @property
    def host(self) -> str:
        return str(self.client.connection_pool.connection_kwargs.get("host", "localhost"))

    def close_idle(self) -> None:
        """Close every connection that is not in use now."""
        self._idle.clear()

    def _open(self) -> Any:
        # The pool's own method counts the connections that it made, broken ones included, up to a hundred.
        pool = self.client.connection_pool
        kind = OWN_CLASSES.get(pool.connection_class, pool.connection_class)
        connection = kind(**pool.connection_kwargs)
        connection.connect()
        return connection

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        connection = self._open()
        try:
            yield connection
        finally:
            connection.disconnect()

    def _connect(self) -> tuple[Any, Server]:
        connection = self._open()
        try:
            return connection, self.server(self._facts(connection))
        except redis.exceptions.RedisError:
            connection.disconnect()
            raise

    def _facts(self, connection: Any) -> "Facts":
        [reply] = _exchange(connection, INFO)
        members = dict(line.split(":", 1) for line in reply.decode(errors="replace").splitlines() if ":" in line)
        names_process = self._notices_end and self._is_at_socket
        return Facts(members, self._at_process(connection, members) if names_process else self.place, [])

    def _at_process(self, connection: Any, members: dict[str, str]) -> str:
        """Return the place together with the process at the other end of the connection, if that is Redis itself."""
        credentials = connection._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        (pid, _, _) = struct.unpack("3i", credentials)
        start = start_of_process(pid) if members.get("process_id") == str(pid) else ""
        return f"{self.place} {pid}.{start}" if start else f"{self.place} ?"

    def has_ended(self, server: Server, sign: Server | BaseException) -> bool:
        """Return whether this server has surely ended, so that it holds nothing.

        Args:
            server: The server.
            sign: What this process met instead of it: another server, or an error.
        """
        if not self._notices_end:
            return False
        if self._is_at_socket:
            place, _, process = server.place.rpartition(" ")
            return place == self.place and _ends(process)
        if server.place != self.place:
            return False
        # The databases of one run have different servers and live together.
        return server.run != sign.run if isinstance(sign, Server) else refused(sign)


class Sent(NamedTuple):
    """Commands whose replies were not read yet. They have to be received, or the connection closed."""

    connection: Any
    server: Server
    kept: bool
    """The connection was used before."""

    commands: tuple[tuple[Argument, ...], ...]
    at: str | None

    def description(self) -> dict[str, str]:
        return {"db.system.name": "redis", "db.operation.name": " ".join(str(command[0]) for command in self.commands)}

    def abandon(self) -> None:
        self.connection.disconnect()


class Facts(NamedTuple):
    members: dict[str, str]
    """The reply to INFO."""

    place: str
    replies: list[Any]
    """The replies to the commands for a node of a cluster; empty for a plain Redis."""

    @property
    def is_cluster(self) -> bool:
        return _mode(self.members) == "cluster"


INFO = ("INFO", "server", "replication")

END_OF_PROCESS_S = 0.05
"""The longest wait for the end of a process that has closed its connections."""


def _mode(members: dict[str, str]) -> str:
    return members.get("redis_mode") or members.get("server_mode") or ""  # the second: Valkey


def _run(members: dict[str, str]) -> str:
    """Return the first part of the id of a server.

    Raises:
        redis.exceptions.RedisError: The server cannot be used as Redis.
    """
    if _mode(members) == "sentinel":
        raise redis.exceptions.RedisError("the mode is sentinel")
    if members.get("role") not in (None, "master"):
        raise redis.exceptions.RedisError("READONLY: the role is not master")
    if "run_id" not in members:
        raise redis.exceptions.RedisError("INFO lacks run_id")
    return f"{members['run_id']}.{members.get('master_replid', '')[:12]}"


def _place(address: dict[str, Any], direct: bool) -> tuple[str, bool]:
    """Return where a server is, and whether its end can be noticed there. Then the place begins with the name of this
    machine, because the same address is another place elsewhere.

    A second Redis takes the path of a Unix socket over while the first one still serves its connections, so there the
    place also names the process that listens (`_at_process`). The name localhost has two addresses.
    """
    if path := address.get("path"):
        return (f"{PROCESSES} {path}", True) if direct else (path, False)
    host = address.get("host", "localhost")
    place = f"{f'[{host}]' if ':' in host else host}:{address.get('port', 6379)}"
    return (f"{HOST} {place}", True) if direct and host != "localhost" and is_loopback(host) else (place, False)


def _ends(process: str) -> bool:
    """Return whether the process `<pid>.<start>` has ended. It closes its connections a moment before it ends, so wait
    for that moment."""
    if process == "?":
        return False
    pid, _, start = process.partition(".")
    until = time.monotonic() + END_OF_PROCESS_S
    while not (ended := process_has_ended(int(pid), start)) and time.monotonic() < until:
        time.sleep(0.005)
    return ended


def _send(connection: Any, commands: tuple[tuple[Argument, ...], ...]) -> None:
    plain = [tuple(it() if callable(it) else it for it in command) for command in commands]
    encoded = [hiredis.pack_command(command) for command in plain]  # type: ignore[arg-type]  # its stub is too narrow
    connection.send_packed_command([b"".join(encoded)])


def _receive(connection: Any, count: int, until: float | None = None) -> list[Any]:
    replies: list[Any] = []
    for _ in range(count):
        # The minimum is for a server that answers at once after others have used up the time.
        timeout = {} if until is None else {"timeout": max(0.05, until - time.monotonic())}
        try:
            replies.append(connection.read_response(disconnect_on_error=True, **timeout))
        except redis.exceptions.ResponseError as error:
            replies.append(error)
    return replies


def _without_errors(replies: list[Any]) -> list[Any]:
    """Raises: redis.exceptions.RedisError: A command had no success."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _exchange(connection: Any, *commands: tuple[Argument, ...]) -> list[Any]:
    _send(connection, commands)
    return _without_errors(_receive(connection, len(commands)))


MOVING = "the cluster moves hash slots"
UNCOVERED = "the cluster does not serve all hash slots"

NO_MEMORY = "has no memory left, and evicts no entries (maxmemory-policy)"
CANNOT_SAVE = "refuses writes, because it cannot save its data to disk"
LOADING = "is loading its data"
NO_RIGHTS = "does not permit its user the commands or keys that this service needs"

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
    "NOPERM": NO_RIGHTS,
    "no permissions": NO_RIGHTS,
    "unknown command": "lacks a command that this service needs (renamed or switched off)",
    "DB index is out of range": "has no database of this number",
    "max number of clients": "has no room for further clients (maxclients)",
    "INFO lacks run_id": "does not name its run_id in INFO, so this service cannot tell it from another Redis",
    "user executing the script can't": NO_RIGHTS,
    "OOM command": NO_MEMORY,
    "MISCONF": CANNOT_SAVE,
    "LOADING": LOADING,
    "BUSY ": "is busy with a script of another program",
    "NOREPLICAS": "refuses writes, because it has too few replicas",
    UNCOVERED: "is a cluster that does not serve all hash slots now",
    "CLUSTERDOWN": "is a cluster that does not serve all hash slots now",
    MOVING: "is a cluster that moves hash slots between its servers now",
    "MOVED": "is a cluster that moves hash slots between its servers now",
    "TRYAGAIN": "is a cluster that moves hash slots between its servers now",
    "SELECT is not allowed": "is a cluster, which has only the database number 0",
    "mode is sentinel": "is a Sentinel: begin the address with redis+sentinel:// and add the name of the primary",
    "knows no primary": "has no primary of this name at the Sentinels",
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
