"""Host names, looked up with a bound on time: a connection's own timeout does not cover getaddrinfo(3), which may wait
for a name server for ten seconds and more.

A new connection follows a changed address. While no name server answers, the last addresses count, as they do for an
edge (edge/lua/resolver.lua). Connections that are kept need no name server.
"""

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

C = TypeVar("C")

# libpq looks names up by itself, in threads of the pools. Its look-ups end this soon after the name server is back; the
# default is 5 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")

FRESH_S = 2.0
"""Seconds for which addresses count without a further look-up."""

Addresses = tuple[str, ...]


@dataclass
class _Name:
    found: Addresses = ()
    found_at: float = -FRESH_S
    look_up: "Future[Addresses] | None" = None
    """The look-up that is going on. All threads share it."""


_names: dict[str, _Name] = {}
_lock = threading.Lock()
os.register_at_fork(after_in_child=_names.clear)  # a forked process lacks the threads that look names up


def addresses(host: str, seconds: float) -> Addresses:
    """Return the addresses of a host. Known addresses are returned after half of the time, if a look-up takes longer.

    Raises:
        OSError: The name does not resolve, or not in time.
    """
    if _is_address(host):
        return (host,)
    with _lock:
        name = _names.setdefault(host, _Name())
        if time.monotonic() - name.found_at < FRESH_S:
            return name.found
        known = name.found
        if name.look_up is None:
            name.look_up = Future()
            threading.Thread(target=_look_up, args=(host, name, name.look_up), name="names", daemon=True).start()
        look_up = name.look_up
    try:
        return look_up.result(timeout=seconds / 2 if known else seconds)
    except OSError:  # also a timeout
        if known:
            return known
        raise


def connect(host: str, port: int, seconds: float) -> socket.socket:
    """Return a connection to the first address of a host that accepts it.

    Raises:
        OSError
    """
    until = time.monotonic() + seconds
    return first_connected(
        host,
        seconds,
        lambda address: socket.create_connection((address, port), max(0.05, until - time.monotonic())),
    )


def first_connected(host: str, seconds: float, connect: Callable[[str], C]) -> C:
    """Return the connection to the first address of a host to which `connect` has success.

    Args:
        host: A name or an address.
        seconds: For the look-up of the name.
        connect: Connects to an address. It raises OSError if it cannot.

    Raises:
        OSError
    """
    failure = OSError(f"the name {host} has no address")
    for address in addresses(host, seconds):
        try:
            return connect(address)
        except OSError as error:
            failure = error
    raise failure


def _look_up(host: str, name: _Name, result: "Future[Addresses]") -> None:
    found: Addresses = ()
    failure: OSError | None = None
    try:
        places = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        found = tuple(dict.fromkeys(str(it[4][0]) for it in places))
    except OSError as error:
        failure = error
    except UnicodeError:
        failure = OSError(f"the name {host} is malformed")
    with _lock:  # before the result: a later request begins another look-up
        name.look_up = None
        if found:
            name.found, name.found_at = found, time.monotonic()
    if failure:
        result.set_exception(failure)
    else:
        result.set_result(found)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
