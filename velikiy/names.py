"""Host names, looked up with a bound on time: a connection's own timeout does not cover getaddrinfo(3), which may wait for
a name server for ten seconds and more.

A new connection looks its name up again, so it follows a changed address. Connections that are kept need no name server.
"""

import ipaddress
import os
import socket
import threading
from concurrent.futures import Future

# libpq looks names up by itself, in threads of the pools. Its look-ups end this soon after the name server is back; the
# default is 5 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")

_running: "dict[str, Future[None]]" = {}
_lock = threading.Lock()


def check(host: str, seconds: float) -> None:
    """Return once the name resolves. All threads that wait for a name share one look-up.

    Raises:
        OSError: It does not resolve, or not in time.
    """
    if _is_address(host):
        return
    with _lock:
        look_up = _running.get(host)
        if look_up is None:
            look_up = _running[host] = Future()
            threading.Thread(target=_look_up, args=(host, look_up), name="names", daemon=True).start()
    try:
        look_up.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"the name {host} was not resolved in time") from None


def _look_up(host: str, result: "Future[None]") -> None:
    failure: BaseException | None = None
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        failure = error if isinstance(error, OSError) else OSError(f"the name {host} is malformed")
    with _lock:
        del _running[host]
    if failure:
        result.set_exception(failure)
    else:
        result.set_result(None)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
