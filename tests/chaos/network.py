"""Faults of the network between the hosts of the service: cut, slow, lossy and garbled connections.

The links between hosts are cut, slowed and made lossy by the kernel, for packets in both directions or in one. Bytes are
changed and withheld by the proxies on both sides of app1 (tests/chaos/hosts.py).
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

from testkit.cluster import CUT, INTACT, Link
from testkit.tcp_proxy import CloseConnection, Hook, ProxiedConnection, TcpProxy
from tests.chaos.fault import Fault, Inject, Limits
from tests.chaos.hosts import APP, CONTROL, HOSTS, Hosts
from tests.chaos.service import Service

BOTH, THERE, BACK = "both", "there", "back"
"""The direction of the packets, from the first to the second end, that a fault concerns."""


def on_links(link: Link, *pairs: tuple[str, str], way: str = BOTH, port: int = 0) -> Inject:
    """Return a fault that changes the links between these pairs of hosts.

    Args:
        port: Change only connections of the first host to this port of the second.
    """

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        try:
            change(cast(Hosts, service), link, pairs, way, port)
            yield
        finally:
            change(cast(Hosts, service), INTACT, pairs, way, port)

    return inject


def change(service: Hosts, link: Link, pairs: Sequence[tuple[str, str]], way: str, port: int) -> None:
    for sender, receiver in pairs:
        one, other = service.end(sender), service.end(receiver)
        if way == BACK:
            service.cluster.change_back(link, one, [other], port=port)
        else:
            service.cluster.change(link, one, [other], both_ways=way == BOTH, port=port)


def flapping(*pairs: tuple[str, str], port: int = 0) -> Inject:
    """Return a fault that cuts links and mends them again and again."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        hosts = cast(Hosts, service)

        def flap(end: threading.Event) -> None:
            while not end.is_set():
                change(hosts, CUT, pairs, BOTH, port)
                end.wait(random.uniform(0.2, 0.8))
                change(hosts, INTACT, pairs, BOTH, port)
                end.wait(random.uniform(0.2, 0.8))

        with service.threads(1, flap):
            yield

    return inject


def on_bytes(proxy: str, replies: Callable[[random.Random, threading.Event], Hook]) -> Inject:
    """Return a fault that changes or withholds what the server behind a proxy sends."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        end = threading.Event()
        it = service.proxies[proxy]
        try:
            it.on_reply = replies(random, end)
            yield
        finally:
            it.reset_hooks()
            end.set()

    return inject


def on_connections(proxy: str, action: Callable[[TcpProxy], None], every_s: float = 0.0) -> Inject:
    """Return a fault that does something to all connections that pass a proxy, once or again and again."""

    @contextmanager
    def inject(service: Service, random: random.Random) -> Iterator[None]:
        it = service.proxies[proxy]

        def repeat(end: threading.Event) -> None:
            while not end.wait(every_s):
                action(it)

        with ExitStack() as context:
            action(it)
            if every_s:
                context.enter_context(service.threads(1, repeat))
            try:
                yield
            finally:
                lose_no_more(it)

    return inject


def half_open(proxy: TcpProxy) -> None:
    """Close the server's side of each connection, as if its host had lost its power. The client's packets vanish."""
    for connection in list(proxy.connections):
        connection.lose_server()


def lose_no_more(proxy: TcpProxy) -> None:
    """Answer the packets of lost connections with RST, as the server's host does once it is back."""
    for connection in list(proxy.connections):
        if connection.is_half_open:
            connection.reset()
            proxy.connections.remove(connection)


def stalled(random: random.Random, end: threading.Event) -> Hook:
    def withhold(connection: ProxiedConnection, data: bytes) -> bytes:
        end.wait()
        return data

    return withhold


def jittery(random: random.Random, end: threading.Event) -> Hook:
    def delay(connection: ProxiedConnection, data: bytes) -> bytes:
        end.wait(random.choice((0, 0, 0.01, 0.05, 0.25)))
        return data

    return delay


def truncated(random: random.Random, end: threading.Event) -> Hook:
    """Pass a part of each reply on, and close the connection in its middle."""

    def cut_short(connection: ProxiedConnection, data: bytes) -> bytes:
        connection.client.sendall(data[: max(1, len(data) * random.randint(1, 9) // 10)])
        raise CloseConnection

    return cut_short


def garbled(random: random.Random, end: threading.Event) -> Hook:
    """Send noise instead of the beginning of each reply."""

    def mix_in(connection: ProxiedConnection, data: bytes) -> bytes:
        return random.randbytes(min(40, len(data))) + data[40:]

    return mix_in


def trickling(random: random.Random, end: threading.Event) -> Hook:
    def trickle(connection: ProxiedConnection, data: bytes) -> bytes:
        for n in range(min(len(data) - 1, 200)):
            connection.client.sendall(data[n : n + 1])
            if end.wait(0.01):
                return data[n + 1 :]
        return data[min(len(data) - 1, 200) :]

    return trickle


# ---- the table ----

LOSSY = {"10": Link(loss=0.1), "30": Link(loss=0.3)}
SLOW = {"50": Link(delay_s=0.05), "200": Link(delay_s=0.2)}


EDGE_APP = (("edge1", "app2"),)
EDGE_APPS = (("edge1", "app2"), ("edge1", "proxies"))
EDGE_REDIS = (("edge1", "redis"),)
APP_REDIS = (("app2", "redis"),)
APP_POSTGRES = (("app2", "postgres"),)
APP_CONTROL = (("app2", "edge1"),)
RELAY_POSTGRES = (("relay", "postgres"),)
CLIENTS_EDGE = (("clients", "edge1"),)

FENCING = ("edge.fenced", "edge.unsteady", "edge.no_lease")
"""An edge that one app does not reach is fenced by the writes of that app, and admitted again by the other app."""

REDIS_OUT = ("redis.unusable", "redis.fenced", "redis.unsteady")


def fault(
    name: str,
    what: str,
    inject: Inject,
    *,
    named: tuple[str, ...] = (),
    unnamed: str = "",
    victims: tuple[str, ...] = (),
    limits: Limits | None = None,
) -> Fault:
    return Fault(
        f"net-{name}",
        what,
        inject,
        seconds=2.0,
        named=named,
        unnamed=unnamed,
        victims=victims,
        limits=limits or Limits(),
        kind=HOSTS,
    )


PROXIES = {
    "app": "the edges and one app",
    "postgres": "one app and PostgreSQL",
    "redis": "one app and Redis",
}

SILENT = {"app": ("app.silent",), "postgres": ("postgres.silent", "postgres.refuses"), "redis": REDIS_OUT}
"""The findings about a server that sends nothing, or no sense."""


def at_proxies(
    name: str,
    what: str,
    inject: Callable[[str], Inject],
    *,
    named: dict[str, tuple[str, ...]] | None = None,
    unnamed: str = "",
) -> list[Fault]:
    """Return a fault for each proxy."""
    named = named or {}
    return [
        fault(
            f"{name}-{proxy}",
            f"{what} {ends}.",
            inject(proxy),
            named=named.get(proxy, ()),
            unnamed="" if proxy in named else unnamed,
        )
        for proxy, ends in PROXIES.items()
    ]


OPEN_AGAIN = "New connections are open at once."
SLOWER = "Requests take longer, and none fails."
RETRANSMITTED = "TCP sends lost packets again: requests take longer."

FAULTS = [
    # Cut links.
    fault("cut-edge-app", "Edge 1 is cut off from one app.", on_links(CUT, *EDGE_APP, port=APP), named=("app.silent",)),
    fault(
        "cut-edge-app-hosts",
        "The hosts of edge 1 and of one app are cut off from each other.",
        on_links(CUT, *EDGE_APP),
        named=("app.silent", *FENCING),
    ),
    fault(
        "cut-edge-apps",
        "Edge 1 is cut off from all apps.",
        on_links(CUT, *EDGE_APPS),
        named=("app.silent", "edge.no_lease"),
        victims=("edge1",),
    ),
    fault("cut-edge-redis", "Edge 1 is cut off from Redis.", on_links(CUT, *EDGE_REDIS), named=("edge.redis_silent",)),
    fault(
        "cut-app-redis", "One app is cut off from Redis, which edges reach.", on_links(CUT, *APP_REDIS), named=REDIS_OUT
    ),
    fault(
        "cut-app-postgres",
        "One app is cut off from PostgreSQL.",
        on_links(CUT, *APP_POSTGRES),
        named=("postgres.silent",),
    ),
    fault(
        "cut-app-control",
        "One app is cut off from the control listener of edge 1.",
        on_links(CUT, *APP_CONTROL, port=CONTROL),
        named=FENCING,
    ),
    fault(
        "cut-relay-postgres",
        "The relay is cut off from PostgreSQL.",
        on_links(CUT, *RELAY_POSTGRES),
        named=("relay.away", "relay.silent"),
    ),
    fault(
        "cut-relay-edge",
        "The relay is cut off from edge 1.",
        on_links(CUT, ("relay", "edge1")),
        unnamed="Nothing but SQL from outside passes the relay, and none happens here.",
    ),
    fault(
        "cut-relay-redis",
        "The relay is cut off from Redis.",
        on_links(CUT, ("relay", "redis")),
        unnamed="Redis stays in use. The relay would be missed only after a fence.",
    ),
    fault(
        "cut-postgres",
        "The host of PostgreSQL is cut off from all others.",
        on_links(CUT, *((it, "postgres") for it in ("proxies", "app2", "relay"))),
        named=("postgres.silent",),
        limits=Limits(reads=0.0),
    ),
    fault(
        "cut-redis",
        "The host of Redis is cut off from all others.",
        on_links(CUT, *((it, "redis") for it in ("proxies", "app2", "relay", "edge1", "edge2"))),
        named=REDIS_OUT,
    ),
    fault(
        "cut-edge",
        "The host of edge 1 is cut off from all others, and clients reach it.",
        on_links(CUT, *((it, "edge1") for it in ("proxies", "app2", "relay", "redis"))),
        named=("app.silent", "edge.no_lease"),
        victims=("edge1",),
    ),
    fault(
        "cut-clients",
        "Clients are cut off from edge 1.",
        on_links(CUT, *CLIENTS_EDGE),
        named=("process.silent",),
        victims=("edge1",),
    ),
    # Packets of one direction are lost.
    fault(
        "deaf-edge-app",
        "No packet of one app arrives at edge 1.",
        on_links(CUT, *EDGE_APP, way=BACK, port=APP),
        named=("app.silent",),
    ),
    fault(
        "mute-edge-app",
        "No packet of edge 1 arrives at one app.",
        on_links(CUT, *EDGE_APP, way=THERE, port=APP),
        named=("app.silent",),
    ),
    fault(
        "deaf-app-redis", "No packet of Redis arrives at one app.", on_links(CUT, *APP_REDIS, way=BACK), named=REDIS_OUT
    ),
    fault(
        "deaf-app-postgres",
        "No packet of PostgreSQL arrives at one app.",
        on_links(CUT, *APP_POSTGRES, way=BACK),
        named=("postgres.silent",),
    ),
    fault(
        "mute-app-postgres",
        "No packet of one app arrives at PostgreSQL.",
        on_links(CUT, *APP_POSTGRES, way=THERE),
        named=("postgres.silent",),
    ),
    fault(
        "deaf-app-control",
        "No acknowledgement of edge 1 arrives at one app.",
        on_links(CUT, *APP_CONTROL, way=BACK, port=CONTROL),
        named=FENCING,
    ),
    fault(
        "mute-edge-redis",
        "No packet of edge 1 arrives at Redis.",
        on_links(CUT, *EDGE_REDIS, way=THERE),
        named=("edge.redis_silent",),
    ),
    # Slow links.
    fault(
        "slow-edge-app-50",
        "Each packet between edge 1 and one app takes 50 ms.",
        on_links(SLOW["50"], *EDGE_APP, port=APP),
        unnamed=SLOWER,
    ),
    fault(
        "slow-edge-app-200",
        "Each packet between edge 1 and one app takes 200 ms.",
        on_links(SLOW["200"], *EDGE_APP, port=APP),
        unnamed="The app answers, late: reads are tried on the other app after 0.3 s.",
    ),
    fault(
        "slow-app-postgres-50",
        "Each packet between one app and PostgreSQL takes 50 ms.",
        on_links(SLOW["50"], *APP_POSTGRES),
        unnamed=SLOWER,
    ),
    fault(
        "slow-app-postgres-200",
        "Each packet between one app and PostgreSQL takes 200 ms.",
        on_links(SLOW["200"], *APP_POSTGRES),
        unnamed="PostgreSQL answers, late: what takes longer than DATABASE_TIMEOUT gets 503.",
        limits=Limits(reads=0.5),
    ),
    fault(
        "slow-app-redis-50",
        "Each packet between one app and Redis takes 50 ms.",
        on_links(SLOW["50"], *APP_REDIS),
        unnamed="A reply within REDIS_TIMEOUT counts, and a later one costs a look at PostgreSQL.",
    ),
    fault(
        "slow-app-redis-200",
        "Each packet between one app and Redis takes 200 ms.",
        on_links(SLOW["200"], *APP_REDIS),
        named=REDIS_OUT,
    ),
    fault(
        "slow-edge-redis-50",
        "Each packet between edge 1 and Redis takes 50 ms.",
        on_links(SLOW["50"], *EDGE_REDIS),
        unnamed="A reply within REDIS_TIMEOUT counts, and after a later one an app reads Redis.",
    ),
    fault(
        "slow-app-control-200",
        "Each packet between one app and edge 1 takes 200 ms.",
        on_links(SLOW["200"], *APP_CONTROL, port=CONTROL),
        named=FENCING,
    ),
    fault(
        "slow-clients-200",
        "Each packet between clients and edge 1 takes 200 ms.",
        on_links(SLOW["200"], *CLIENTS_EDGE),
        unnamed="Only these clients notice.",
        victims=("edge1",),
    ),
    # Lossy links.
    *(
        fault(
            f"lossy-{name}-{share}",
            f"{share} % of the packets between {ends} are lost.",
            on_links(link, *pairs, port=port),
            unnamed=RETRANSMITTED,
            limits=limits,
        )
        for share, link in LOSSY.items()
        for name, ends, pairs, port, limits in (
            ("edge-app", "edge 1 and one app", EDGE_APP, APP, Limits()),
            ("app-postgres", "one app and PostgreSQL", APP_POSTGRES, 0, Limits(reads=0.3)),
            ("app-redis", "one app and Redis", APP_REDIS, 0, Limits()),
            ("edge-redis", "edge 1 and Redis", EDGE_REDIS, 0, Limits()),
        )
    ),
    fault(
        "lossy-app-control-30",
        "30 % of the packets between one app and edge 1 are lost.",
        on_links(LOSSY["30"], *APP_CONTROL, port=CONTROL),
        unnamed=RETRANSMITTED,
    ),
    fault(
        "lossy-clients-30",
        "30 % of the packets between clients and edge 1 are lost.",
        on_links(LOSSY["30"], *CLIENTS_EDGE),
        unnamed="Only these clients notice.",
        victims=("edge1",),
    ),
    # Links that are cut and mended again and again.
    fault(
        "flapping-edge-app",
        "The link between edge 1 and one app is cut and mended again and again.",
        flapping(*EDGE_APP, port=APP),
        unnamed="Each cut is over before an app counts as silent.",
    ),
    fault(
        "flapping-app-control",
        "The link between one app and edge 1 is cut and mended again and again.",
        flapping(*APP_CONTROL, port=CONTROL),
        named=FENCING,
    ),
    fault(
        "flapping-app-postgres",
        "The link between one app and PostgreSQL is cut and mended again and again.",
        flapping(*APP_POSTGRES),
        unnamed="Each cut is over before status can look.",
        limits=Limits(reads=0.3),
    ),
    fault(
        "flapping-app-redis",
        "The link between one app and Redis is cut and mended again and again.",
        flapping(*APP_REDIS),
        named=REDIS_OUT,
    ),
    # Bytes and connections, at the proxies of app1.
    *at_proxies("stall", "No byte of a reply passes between", lambda it: on_bytes(it, stalled), named=SILENT),
    *at_proxies(
        "jitter", "Each reply is late by 0 to 250 ms between", lambda it: on_bytes(it, jittery), unnamed=SLOWER
    ),
    *at_proxies(
        "reset",
        "All connections are reset each second between",
        lambda it: on_connections(it, TcpProxy.reset_connections, 1.0),
        unnamed=OPEN_AGAIN,
    ),
    *at_proxies(
        "half-open",
        "The server forgets all connections, and its clients do not notice, between",
        lambda it: on_connections(it, half_open),
        named={"app": ("app.silent",)},
        unnamed=OPEN_AGAIN,
    ),
    *at_proxies(
        "truncate",
        "Each reply is cut off in its middle between",
        lambda it: on_bytes(it, truncated),
        named={it: SILENT[it] for it in ("postgres", "redis")},
        unnamed="Reads are sent to the other app.",
    ),
    *at_proxies("garble", "Each reply begins with noise between", lambda it: on_bytes(it, garbled), named=SILENT),
    fault(
        "trickle-app",
        "One app answers byte by byte.",
        on_bytes("app", trickling),
        unnamed="The app answers, slowly: reads are tried on the other app after 0.3 s.",
    ),
]
