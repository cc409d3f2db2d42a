"""Tier 2: one Redis hash for each path, one field for each variant of it, and leases for those who fill them.

Lost, evicted or flushed, Redis only ever loses speed: what is not there is read from PostgreSQL, and a lease that
is not there refuses its fill.
"""

import hashlib
import itertools
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path as File
from typing import Any, NamedTuple

import hiredis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

import redis
from velikiy.coherence.entry import Entry, Path
from velikiy.coherence.membership import PATIENCE, Trust, now
from velikiy.kernel_timeouts import Socket
from velikiy.postgres import DatabaseUnavailable

log = structlog.get_logger()

AWAY = (redis.exceptions.RedisError, OSError)
SCRIPTS = File(__file__).parent / "scripts"


class Lease(str):
    """The right to fill one variant of a path, until a write drops it: a token that was never used before
    (Gray and Cheriton, Leases, 1989; and as in Facebook's memcache, NSDI 2013)."""


class Hit(NamedTuple):
    entry: Entry
    ttl: int
    """Seconds that Redis keeps it."""


class NewLease:
    """A lease that is asked for, with each attempt another one. A question whose reply was lost may come to Redis late,
    out of what stands between us and it; with the same token it would give a lease again that a write has taken away,
    and what was read before that write would be stored after it."""

    given = Lease("")

    def __call__(self) -> Lease:
        self.given = new_lease()
        return self.given


Word = str | bytes | int | Callable[[], str]
"""What is called is called for each attempt."""


class Script:
    """A program for Redis: its file, named by its digest once Redis knows it."""

    def __init__(self, name: str) -> None:
        self.text = (SCRIPTS / f"{name}.lua").read_bytes()
        self.digest = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()

    def run(self, key: str, *words: Word) -> tuple[Word, ...]:
        return ("EVALSHA", self.digest, 1, key, *words)

    def load(self, key: str, *words: Word) -> tuple[Word, ...]:
        return ("EVAL", self.text, 1, key, *words)


READ, FILL, DROP = Script("read"), Script("fill"), Script("drop")


class TcpConnection(redis.Connection):
    """redis-py's own class for everything but TLS and Unix' sockets."""

    def _connect(self) -> Socket:
        return Socket(super()._connect())  # type: ignore[no-untyped-call]


class Connections:
    """redis-py's, with their addresses, passwords and TLS. Its client does more for each command than Redis itself."""

    def __init__(self, url: str, timeout: float) -> None:
        """`timeout`: seconds to connect, and to be answered."""
        self.client = redis.Redis.from_url(
            url,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            retry=Retry(NoBackoff(), 0),  # the default tries for up to a minute: PostgreSQL is faster
        )
        self._idle: deque[tuple[Any, int]] = deque()
        """Each with how many answers it has yet to hear."""

    def ask(self, *commands: tuple[Word, ...], listen: bool = True) -> list[Any]:
        """What Redis says to each, in one exchange; an error of its own is raised after all have been heard. Who does
        not `listen` waits for nothing, and is told nothing: whoever uses the connection next hears the answers.

        Raises:
            redis.exceptions.RedisError
        """
        try:
            (connection, unheard), kept = self._idle.pop(), True
        except IndexError:
            # The pool's own method counts those that it made, broken ones too, and makes no more than a hundred.
            pool = self.client.connection_pool
            kind = TcpConnection if pool.connection_class is redis.Connection else pool.connection_class
            connection, unheard, kept = kind(**pool.connection_kwargs), 0, False
        try:
            _send(connection, commands)
            answers = _hear(connection, unheard + (len(commands) if listen else 0))[unheard:]
        except redis.exceptions.ConnectionError:
            if not kept:
                raise
            # A kept connection to a Redis that was restarted is broken: a new one tells what is there now. What may be
            # done twice by this is a drop, or finds its lease gone.
            self._idle.clear()
            return self.ask(*commands, listen=listen)
        self._idle.append((connection, 0 if listen else len(commands)))
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def run(self, script: Script, *calls: tuple[Any, ...], after: Sequence[tuple[Word, ...]] = ()) -> list[Any]:
        """What the script answers to each of these calls (a key, words), in one exchange with the commands before."""
        try:
            return self.ask(*after, *(script.run(*call) for call in calls))[len(after) :]
        except redis.exceptions.NoScriptError:
            return self.ask(*(script.load(*call) for call in calls))


def _send(connection: Any, commands: tuple[tuple[Word, ...], ...]) -> None:
    spoken = [tuple(word() if callable(word) else word for word in words) for words in commands]
    connection.send_packed_command([b"".join([hiredis.pack_command(words) for words in spoken])])  # type: ignore[arg-type]  # its stub names one word


def _hear(connection: Any, count: int) -> list[Any]:
    answers: list[Any] = []
    for _ in range(count):
        try:
            answers.append(connection.read_response(disconnect_on_error=True))
        except redis.exceptions.ResponseError as error:
            answers.append(error)
    return answers


class DoesNotAnswer(Exception):
    """A drop that Redis may or may not have done. Whoever uses it may find there what was to be dropped."""


class RedisTier:
    """Reads and fills skip Redis for a second after it failed to answer (a breaker): a Redis that hangs would
    otherwise cost every read its timeout. And they skip it when it is fenced (`Trust`).

    An edge does so only if it was told nothing else meanwhile (edge/lua/redis.lua): it waits without holding anything,
    and behind it are apps, which carry a tenth. A thread that waits here is one of a few, and PostgreSQL carries its
    reads: where a twentieth of all questions is lost, waiting on would cost the app most of its throughput.
    """

    REST = 1.0
    """Seconds."""

    LEASE = 3.0
    """Seconds after which a lease is void, and somebody else may have it. Only speed depends on this number."""

    def __init__(self, url: str, trust: Trust, *, ttl: int, timeout: float, direct: bool = False) -> None:
        """`ttl`: seconds from the first fill of a path; `timeout`: seconds to connect, and to be answered; `direct`:
        at this address nobody but Redis itself can refuse a connection."""
        self.ttl = ttl
        self.direct = direct
        self.trust = trust
        self._hasty = Connections(url, timeout)
        # What a write waits for is not given up as early: to go on without Redis costs it a fence.
        self._patient = Connections(url, PATIENCE)
        self._skip_until = 0.0

    def read(self, path: Path, variant: str, *, patience: float = 0.02) -> Hit | Lease | None:
        """The entry, or the lease to fill it, or None: Redis is fenced or does not answer, or somebody else is
        filling and was not done within `patience` seconds.

        Raises:
            DatabaseUnavailable: Redis may not be used without a word from PostgreSQL, which does not answer.
        """
        if self.resting:
            return None
        lease = NewLease()
        end = time.monotonic() + patience
        try:
            while True:
                trusted_until = self.trust.until()
                if now() >= trusted_until:
                    return None
                [(state, *found)] = self._hasty.run(READ, (path.key, variant, lease, int(self.LEASE * 1000)))
                if now() >= trusted_until:
                    return None  # a write may have passed by a fenced Redis meanwhile
                if state == 1:
                    entry, milliseconds = found
                    return Hit(Entry.unpack(entry), max(0, milliseconds) // 1000)
                if state == 2:
                    return lease.given
                if time.monotonic() >= end:
                    return None
                time.sleep(patience / 5)
        except (redis.exceptions.ResponseError, ValueError):
            # Somebody else's, under our key: a string, a list, bytes that are no entry.
            self._forget(path)
        except AWAY as error:
            self._failed("read", error)
        return None

    def fill(self, path: Path, variant: str, lease: Lease, entry: Entry | None) -> None:
        """Store it, if the lease is still there; None gives the lease back. Nobody waits for it: who asks Redis
        afterwards finds what is stored."""
        if self.resting:
            return
        try:
            packed = entry.pack() if entry else b""
            # With all of the script: that Redis does not know it would be among what is not heard.
            self._hasty.ask(FILL.load(path.key, variant, lease, packed, self.ttl * 1000), listen=False)
        except AWAY as error:
            self._failed("fill", error)

    def drop(self, paths: Iterable[Path] | None, mine: Sequence[Path] = ()) -> dict[Path, Lease]:
        """Forget these paths, or with None everything. The leases to fill those that are `mine`; none, where Redis is
        fenced.

        A Redis that refuses at its own socket is dead, and holds nothing. At any other address somebody may refuse for
        one that lives: a forwarder, a balancer, a firewall.

        Raises:
            DoesNotAnswer
        """
        leases = {path: NewLease() for path in mine}
        trusted_until = 0.0
        if mine:
            with suppress(DatabaseUnavailable):
                trusted_until = self.trust.until()
        others: list[tuple[Word, ...]] = [("FLUSHDB", "ASYNC")]
        if paths is not None:
            others = [("UNLINK", path.key) for path in paths if path not in leases]
        calls = [(path.key, lease, int(self.LEASE * 1000)) for path, lease in leases.items()]
        try:
            self._patient.run(DROP, *calls, after=others)
        except AWAY as error:
            if self.direct and refused(error):
                return {}
            self._failed("drop", error)
            raise DoesNotAnswer from error
        return {path: lease.given for path, lease in leases.items()} if now() < trusted_until else {}

    def show(self, path: Path) -> dict[str, Any]:
        """For people: bytes of each variant, who has a lease, and the seconds that all of it lives.

        Raises:
            DoesNotAnswer
        """
        try:
            fields: Any = self._patient.client.hgetall(path.key)
            ttl: Any = self._patient.client.pttl(path.key)
        except AWAY as error:
            raise DoesNotAnswer from error
        names = {name.decode(errors="replace"): len(value) for name, value in fields.items()}
        bodies = {name.removeprefix("body:"): size for name, size in names.items() if name.startswith("body:")}
        leases = [name.removeprefix("lease:") for name in names if name.startswith("lease:")]
        return {"bytes": bodies, "leases": leases, "ttl": max(0, ttl) / 1000}

    def keeps_over_a_restart(self) -> list[str]:
        """Settings by which it would come back with what it held before: nothing would tell that from what is true.
        Nothing where it does not say."""
        try:
            settings: Any = self._patient.client.config_get("save", "appendonly")
        except AWAY:
            return []
        text = {name: value.decode() if isinstance(value, bytes) else value for name, value in settings.items()}
        return [
            f"{name} {text[name]}" for name, off in (("save", ""), ("appendonly", "no")) if text.get(name, off) != off
        ]

    def answers(self) -> bool:
        try:
            return bool(self._hasty.client.ping())
        except AWAY:
            return False

    @property
    def resting(self) -> bool:
        return time.monotonic() < self._skip_until

    @property
    def doubtful(self) -> bool:
        """It may be fenced, for all that this process knows."""
        try:
            return self.resting or now() >= self.trust.until()
        except DatabaseUnavailable:
            return True

    def _forget(self, path: Path) -> None:
        try:
            self._hasty.ask(("UNLINK", path.key))
        except AWAY as error:
            self._failed("read", error)

    def _failed(self, what: str, error: Exception) -> None:
        self._skip_until = time.monotonic() + self.REST
        log.warning("redis.unavailable", during=what, cause=type(error).__name__)


def new_lease() -> Lease:
    return Lease(f"{_run(os.getpid())}.{next(_leases)}")


_leases = itertools.count()
"""Threads share it: one call of `next` is not interrupted."""


@cache
def _run(process: int) -> str:
    """Of this process alone; one that was forked has another number."""
    return secrets.token_hex(8)


def refused(error: BaseException | None) -> bool:
    """Nobody listens there. No other error shows that a server holds nothing: one that resets a connection, or has no
    room for it, may hold what it likes."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False
