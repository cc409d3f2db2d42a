"""Faults of the name server: silent, slow, without the names, with other addresses."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import cast

import psycopg

from testkit.cluster import CUT, INTACT
from testkit.name_server import NameServer
from testkit.stack import status_of
from tests.chaos.fault import Fault, Inject, Limits
from tests.chaos.hosts import NAMED_HOSTS, Hosts, name_of
from tests.chaos.network import REDIS_OUT
from tests.chaos.postgres import END_SESSIONS
from tests.chaos.service import Service

BLACK_HOLE = "fd00:198:18::1"
"""No host has this address."""

SERVERS = ("postgres", "redis", "app2", "edge1", "edge2")


def on_names(change: Callable[[NameServer], None], *, connect_again: bool = False) -> Inject:
    """Return a fault of the name server.

    Args:
        connect_again: All sessions of PostgreSQL and all connections of Redis end, so that new ones are needed.
    """

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        names = _names(service)
        try:
            change(names)
            if connect_again:
                end_connections(service)
            yield
        finally:
            names.reset()

    return inject


def end_connections(service: Service) -> None:
    with suppress(psycopg.Error), service.connect() as connection:
        connection.execute(END_SESSIONS)
    service.redis().client_kill_filter(_type="normal", skipme=True)


@contextmanager
def with_addresses(service: Service, addresses: Mapping[str, list[str]]) -> Iterator[None]:
    """Give names other addresses."""
    names = _names(service)
    before = dict(names.addresses)
    try:
        names.addresses.update(addresses)
        yield
    finally:
        names.addresses.update(before)


@contextmanager
def ipv6_first(service: Service, random: random.Random) -> Iterator[None]:
    known = _names(service).addresses
    with with_addresses(service, {name_of(it): [BLACK_HOLE, *known[name_of(it)]] for it in SERVERS}):
        end_connections(service)
        yield


@contextmanager
def moved(service: Service, random: random.Random) -> Iterator[None]:
    """PostgreSQL and Redis are at other addresses: nothing answers app2 at those from before."""
    hosts = cast(Hosts, service)
    ends = [hosts.host("postgres"), hosts.host("redis")]
    with with_addresses(service, {name_of(it): [hosts.proxy_address] for it in ("postgres", "redis")}):
        try:
            hosts.cluster.change(CUT, hosts.host("app2"), ends, both_ways=True)
            began = time.monotonic()
            service.until(lambda: status_of(f"{hosts.apps[1]}/readyz") == 200, within=10, what="app2 is ready again")
            service.note(f"app2 was ready again after {time.monotonic() - began:.1f} s")
            yield
        finally:
            hosts.cluster.change(INTACT, hosts.host("app2"), ends, both_ways=True)


def _names(service: Service) -> NameServer:
    names = cast(Hosts, service).names
    assert names, "the kind of service has a name server"
    return names


def is_silent(names: NameServer) -> None:
    names.is_silent = True


def is_slow(names: NameServer) -> None:
    names.delay_s = 0.8


def knows_nothing(names: NameServer) -> None:
    names.knows_nothing = True


OPEN = "Connections that are open need no name server."
NEW = ("postgres.silent", "postgres.refuses", "relay.away", "relay.silent", *REDIS_OUT)


KEPT = Limits()

NEEDED = Limits(reads=0.9)
"""The requests whose connections end get 503, and further ones until new connections are open."""


def fault(
    name: str, what: str, inject: Inject, limits: Limits, *, named: tuple[str, ...] = (), unnamed: str = ""
) -> Fault:
    return Fault(
        f"names-{name}", what, inject, seconds=2.0, named=named, unnamed=unnamed, limits=limits, kind=NAMED_HOSTS
    )


FAULTS = [
    fault("silent", "The name server does not answer.", on_names(is_silent), KEPT, unnamed=OPEN),
    fault("unknown", "The name server knows no name any more.", on_names(knows_nothing), KEPT, unnamed=OPEN),
    fault("slow", "The name server answers after 0.8 s.", on_names(is_slow), KEPT, unnamed=OPEN),
    fault(
        "silent-reconnect",
        "The name server does not answer, and all connections to PostgreSQL and Redis end.",
        on_names(is_silent, connect_again=True),
        NEEDED,
        named=NEW,
    ),
    fault(
        "unknown-reconnect",
        "The name server knows no name, and all connections to PostgreSQL and Redis end.",
        on_names(knows_nothing, connect_again=True),
        NEEDED,
        named=NEW,
    ),
    fault(
        "slow-reconnect",
        "The name server answers after 0.8 s, and all connections to PostgreSQL and Redis end.",
        on_names(is_slow, connect_again=True),
        NEEDED,
        unnamed="New connections are open after the look-up.",
    ),
    fault(
        "ipv6-first",
        "Each name has an IPv6 address at which nothing answers, before the right one, and all connections end.",
        ipv6_first,
        NEEDED,
        unnamed="The second address is tried.",
    ),
    fault(
        "moved",
        "PostgreSQL and Redis are at other addresses, and one app reaches nothing at those from before.",
        moved,
        KEPT,
        unnamed="The app follows the names.",
    ),
]
