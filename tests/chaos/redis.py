"""Faults of Redis: emptied, restarted with other data, without memory, slow, refusing, replaced.

The administrator is a person who may do everything at Redis, and a stranger is another program that uses it.
"""

import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis

from testkit.databases import answers
from testkit.stack import folder, running, wait_until
from tests.chaos.actions import pause, removed, whole
from tests.chaos.disks import not_writable
from tests.chaos.fault import FEW_WRITES_WAIT, Fault, Inject
from tests.chaos.service import Kind, Service

ADMINISTRATOR, PASSWORD = "administrator", "of the administrator"
"""A user who may do everything. The user of the service may neither configure Redis nor close its connections."""


class AdministeredService(Service):
    def redis(self, **options: Any) -> "redis.Redis":
        user = {"username": ADMINISTRATOR, "password": PASSWORD}
        path = str(self.plan.redis_socket)
        return redis.Redis(
            unix_socket_path=path, **{"socket_timeout": 2, "socket_connect_timeout": 2, **user, **options}
        )


@contextmanager
def with_administrator() -> Iterator[Service]:
    with running("--edges", "2", "--apps", "2") as stack:
        service = AdministeredService(stack, stack.edges)
        with (stack.data / "secrets" / "redis.conf").open("a") as file:
            file.write(f'user {ADMINISTRATOR} on ">{PASSWORD}" ~* &* +@all\n')
        service.kill(*service.pids("redis"))
        with service.redis() as client:
            wait_until(lambda: answers(client), what="Redis knows its administrator")
        yield service


ADMINISTERED = Kind("administered Redis", with_administrator)


def commands(*begin: str, end: tuple[str, ...] = ()) -> Inject:
    """Return a fault in which the administrator runs these commands, and others at the end."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        try:
            execute(service, *begin)
            yield
        finally:
            undo(service, *end)

    return inject


def execute(service: Service, *lines: str) -> None:
    """Run these commands. While Redis takes none, try again."""

    def succeeds() -> bool:
        with suppress(redis.RedisError), service.redis() as client:
            for line in lines:
                client.execute_command(*line.split(" "))
            return True
        return False

    service.until(succeeds, within=20, what="Redis takes commands")


def undo(service: Service, *lines: str) -> None:
    """Run these commands at the end of a fault, whatever the other fault of a pair does."""
    with service.redis() as client:
        end_script(client)
    execute(service, *lines)


def end_script(client: "redis.Redis") -> None:
    """End the script of `busy_with_a_script`, if it runs: meanwhile Redis refuses every other command."""
    with suppress(redis.RedisError):
        client.script_kill()


def configured(**settings: str) -> Inject:
    """Return a fault in which the administrator sets these parameters. Each `_` stands for `-`."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        with service.redis() as client:
            names = [name.replace("_", "-") for name in settings]
            before: dict[str, str] = {name: client.config_get(name)[name] for name in names}
            try:
                for name, value in zip(names, settings.values(), strict=True):
                    client.config_set(name, value)
                yield
            finally:
                end_script(client)
                for name, value in before.items():  # on the connection that is open: it is needed after maxclients
                    client.config_set(name, value)

    return inject


def again_and_again(action: "Callable[[redis.Redis], object]", pause_s: float = 0.1) -> Inject:
    """Return a fault in which the administrator does this again and again."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        def step(end: threading.Event) -> None:
            with suppress(redis.RedisError):
                action(client)

        with service.redis() as client, service.repeat(step, pause_s):
            yield

    return inject


# ---- memory ----


@contextmanager
def without_memory(service: Service, random: random.Random) -> Iterator[None]:
    with configured(maxmemory_policy="noeviction", maxmemory="1")(service, random):
        yield


@contextmanager
def evicting(service: Service, random: random.Random) -> Iterator[None]:
    """Leave room for a few entries."""
    with service.redis() as client:
        empty: Any = client.info("memory")
        with configured(maxmemory=str(int(empty["used_memory"]) - 10_000))(service, random):
            yield


@contextmanager
def filled_by_a_stranger(service: Service, random: random.Random) -> Iterator[None]:
    """A stranger writes large values without end, so Redis evicts the entries of the service."""

    def fill(client: "redis.Redis") -> None:
        for _ in range(10):
            client.set(f"stranger:{random.random()}", b"x" * 1_000_000, ex=5)

    with again_and_again(fill, 0.01)(service, random):
        yield
    execute(service, "FLUSHALL")


# ---- restarts ----


@contextmanager
def restarted_with(service: Service, dump: Path, *options: str) -> Iterator[None]:
    """Kill Redis, and let it start with this dump and further options."""
    home, script = service.plan.home, service.plan.home / "run" / "redis"
    original = script.read_text()
    loaded = home / "redis" / "dump.rdb"
    shutil.copy(dump, loaded)
    shutil.chown(loaded, loaded.parent.stat().st_uid, loaded.parent.stat().st_gid)
    try:
        script.write_text(f"{original.rstrip()} {' '.join(options)}\n")
        service.kill(*service.pids("redis"))
        yield
    finally:
        script.write_text(original)
        loaded.unlink(missing_ok=True)
        if options:
            service.kill(*service.pids("redis"))


@contextmanager
def copied(service: Service, entries: int = 0) -> Iterator[Path]:
    """Yield a dump with every entry that Redis has now, and so many others."""
    with folder() as home, redis_in(home / "copy.sock", "--dir", str(home)) as copy, service.redis() as client:
        for key in client.scan_iter(count=1000):
            dumped: Any = client.dump(key)
            if dumped:
                copy.restore(key, 0, dumped, replace=True)
        with copy.pipeline(transaction=False) as pipeline:
            for number in range(entries):
                pipeline.set(f"other:{number}", "x")
            pipeline.execute()
        copy.save()
        yield home / "dump.rdb"


@contextmanager
def redis_in(path: Path, *options: str, **owner: int) -> "Iterator[redis.Redis]":
    """Run a Redis at this Unix socket, and yield a client of it."""
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", *options],
        stdout=subprocess.DEVNULL,
        **owner,  # type: ignore[call-overload]
    )
    try:
        with redis.Redis(unix_socket_path=str(path)) as client:
            wait_until(path.exists, within=5)
            yield client
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def restarted_with_old_entries(service: Service, random: random.Random) -> Iterator[None]:
    """Restart Redis with the entries of a second ago. Writes have changed some of the rows since."""
    with copied(service) as dump:
        service.wait(1)
        with restarted_with(service, dump):
            yield


@contextmanager
def loading(service: Service, random: random.Random) -> Iterator[None]:
    """Restart Redis with a dump that takes seconds to load."""
    with copied(service, 5000) as dump, restarted_with(service, dump, "--key-load-delay", "2000"):
        yield


# ---- refusals ----


@contextmanager
def cannot_save(service: Service, random: random.Random) -> Iterator[None]:
    """Redis has to save its data and cannot write to its folder."""
    with not_writable(service.plan.home / "redis"), configured(save="1 1")(service, random):
        yield


@contextmanager
def no_room_for_clients(service: Service, random: random.Random) -> Iterator[None]:
    """A stranger takes every connection that Redis has room for, those of the service included."""
    # The strangers leave first: the connection that sets the limit back must find room.
    with service.redis() as client, configured(maxclients="10000")(service, random), ExitStack() as strangers:
        for _ in range(20):
            strangers.enter_context(service.redis()).ping()
        client.config_set("maxclients", 22)
        client.execute_command("CLIENT", "KILL", "USER", "default")
        yield


@contextmanager
def busy_with_a_script(service: Service, random: random.Random) -> Iterator[None]:
    def loop(end: threading.Event) -> None:
        with suppress(redis.RedisError), service.redis(socket_timeout=30) as client:
            client.eval("while true do end", 0)

    with configured(busy_reply_threshold="100")(service, random), service.threads(1, loop):
        try:
            yield
        finally:
            undo(service, "PING")


@contextmanager
def password_changed(service: Service, random: random.Random) -> Iterator[None]:
    """The administrator changes the password of the service and closes its connections."""
    try:
        with service.redis() as client:
            client.execute_command("ACL", "SETUSER", "default", "resetpass", ">another")
            client.client_kill_filter(_type="normal", skipme=True)
        yield
    finally:
        undo(service, f"ACL SETUSER default resetpass >{service.stack.secret('redis_password')}")


# ---- another Redis ----


@contextmanager
def replaced(service: Service, random: random.Random) -> Iterator[None]:
    """Another Redis takes over the socket, while the first one goes on with its open connections."""
    socket, password = service.plan.redis_socket, service.stack.secret("redis_password")
    owner = socket.stat()
    with (
        removed(lambda service: socket)(service, random),
        redis_in(socket, "--dir", "/", "--requirepass", password, user=owner.st_uid, group=owner.st_gid),
    ):
        yield


# ---- values ----


def spoil(client: "redis.Redis") -> None:
    """Put a value of another type under every key."""
    for key in client.scan_iter(count=1000):
        client.set(key, "of another program")


def end_connections(client: "redis.Redis") -> None:
    client.client_kill_filter(_type="normal", skipme=True)


FAULTS = [
    Fault(
        "redis-flushed",
        "The administrator runs FLUSHALL again and again.",
        again_and_again(lambda client: client.flushall()),
        unnamed="harmless: an empty Redis costs speed only",
        limits=FEW_WRITES_WAIT,
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-connections-ended",
        "The administrator closes every connection again and again.",
        again_and_again(end_connections),
        unnamed="harmless: a request connects again",
        limits=FEW_WRITES_WAIT,
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-scripts-flushed",
        "The administrator runs SCRIPT FLUSH again and again.",
        again_and_again(lambda client: client.script_flush(), 0.01),
        unnamed="harmless: a request loads its script again",
        limits=FEW_WRITES_WAIT,
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-values-spoilt",
        "A stranger puts values of another type under the keys of the service again and again.",
        again_and_again(spoil),
        unnamed="harmless: a read removes such a value",
        limits=FEW_WRITES_WAIT,
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-paused",
        "Redis pauses for 0.2 s again and again, so each drop takes up to 0.2 s.",
        pause(whole("redis"), 0.2, 0.02),
        seconds=3,
        named=("redis.slow", "redis.unusable", "redis.fenced", "redis.unsteady"),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-slow",
        "Redis pauses for 0.35 s again and again: a little less than a write waits for it.",
        pause(whole("redis"), 0.35, 0.02),
        seconds=3,
        named=("redis.slow", "redis.unusable", "redis.fenced", "redis.unsteady"),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-writes-paused",
        "The administrator pauses all writes (CLIENT PAUSE ... WRITE).",
        commands("CLIENT PAUSE 60000 WRITE", end=("CLIENT UNPAUSE",)),
        named=("redis.unusable", "redis.fenced"),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-without-memory",
        "Redis has no memory left and evicts nothing (noeviction).",
        without_memory,
        named=("redis.full",),
        limits=FEW_WRITES_WAIT,
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-evicting",
        "Redis has too little memory, and evicts nearly every entry.",
        evicting,
        unnamed="harmless: evictions cost speed only, and ./run status counts them",
        limits=FEW_WRITES_WAIT,
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-filled-by-a-stranger",
        "A stranger fills Redis with large values.",
        filled_by_a_stranger,
        unnamed="harmless: Redis evicts the entries of the service, which costs speed only",
        limits=FEW_WRITES_WAIT,
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-restarted-with-old-entries",
        "Redis is killed, and starts with the entries of a second ago.",
        restarted_with_old_entries,
        unnamed="it is emptied and used again within a second",
        limits=FEW_WRITES_WAIT,
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-loading",
        "Redis is killed, and takes seconds to load a dump.",
        loading,
        named=("redis.unusable",),
        seconds=3,
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-cannot-save",
        "Redis has to save its data and cannot (MISCONF).",
        cannot_save,
        seconds=3,
        named=("redis.unusable",),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-replica",
        "Redis becomes a replica of another server.",
        commands("REPLICAOF 127.0.0.1 1", end=("REPLICAOF NO ONE",)),
        named=("redis.unusable",),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-replicas-missing",
        "Redis refuses writes without a replica (min-replicas-to-write).",
        configured(min_replicas_to_write="1"),
        named=("redis.unusable",),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-without-flushdb",
        "The user of the service loses the right to run FLUSHDB.",
        commands("ACL SETUSER default -flushdb", end=("ACL SETUSER default +flushdb",)),
        named=("redis.refused",),
        limits=FEW_WRITES_WAIT,
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-without-scripts",
        "The user of the service loses the right to run scripts.",
        commands("ACL SETUSER default -evalsha -eval", end=("ACL SETUSER default +evalsha +eval",)),
        named=("redis.refused", "redis.unusable"),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-without-keys",
        "The user of the service loses the right to every key.",
        commands("ACL SETUSER default resetkeys", end=("ACL SETUSER default allkeys",)),
        named=("redis.refused", "redis.unusable"),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-password-changed",
        "Redis gets another password, and the connections of the service are closed.",
        password_changed,
        named=("redis.unusable",),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-full-of-clients",
        "A stranger takes every connection of Redis (maxclients).",
        no_room_for_clients,
        named=("redis.unusable",),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-busy",
        "A script of a stranger runs without end.",
        busy_with_a_script,
        named=("redis.unusable",),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-replaced",
        "Another Redis takes over the socket, while the first one serves its open connections.",
        replaced,
        named=("redis.another", "redis.contested", "redis.fenced"),
        kind=ADMINISTERED,
    ),
    Fault(
        "redis-shut-down",
        "The administrator shuts Redis down (SHUTDOWN NOSAVE), and supervisor starts it again.",
        again_and_again(lambda client: client.shutdown(nosave=True), 1.5),
        unnamed="an empty Redis serves again within a second",
        kind=ADMINISTERED,
    ),
]
