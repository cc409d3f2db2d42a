"""Requests to the servers of the stack. They pass no proxy, even if http_proxy names one."""

import contextlib
import socket
import ssl
import urllib.request
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

from velikiy.signatures import HEADER, Signer

UNANSWERED = (OSError, ValueError, HTTPException)
"""The exceptions of a request that fails, or that is not answered with a success."""

# The certificate of an edge names the host of its clients, and not the loopback address of these requests.
_unverified = ssl.create_default_context()
_unverified.check_hostname = False
_unverified.verify_mode = ssl.CERT_NONE

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_unverified))


def get(url: str, *, timeout: float = 3) -> str:
    """Return the body of the response.

    Raises:
        UNANSWERED
    """
    with _direct.open(url, timeout=timeout) as response:
        return str(response.read().decode())


def get_signed(url: str, secret: str, *, timeout: float = 3) -> str:
    """Return the body of the response of an edge. Only an edge with this secret can send it.

    Raises:
        UNANSWERED
    """
    signer = Signer(secret)
    signed, mac = signer.sign_request("GET", urlsplit(url).path)
    request = urllib.request.Request(url, headers={HEADER: signed})  # noqa: S310 - an address of the stack's own
    with _direct.open(request, timeout=timeout) as response:
        body = str(response.read().decode())
    if response.headers[HEADER] != signer.response_mac(mac, response.status, body):
        raise ValueError(f"another server answers at {url}")
    return body


def get_any(url: str, *, timeout: float = 3) -> str:
    """Return the body of the response, whatever its status is.

    Raises:
        UNANSWERED
    """
    try:
        return get(url, timeout=timeout)
    except HTTPError as error:
        return str(error.read().decode())


def get_at(path: Path, target: str, *, timeout: float = 3) -> str:
    """Return the body of the response of the server at this Unix socket, whatever its status is.

    Raises:
        UNANSWERED
    """
    return _exchange(path, target, timeout)[1]


def answers_at(path: Path, target: str, *, timeout: float = 3) -> bool:
    """Return whether the server at this Unix socket answers with a success."""
    return status_at(path, target, timeout=timeout) == 200


def status_at(path: Path, target: str, *, timeout: float = 3) -> int:
    """Return the status of the response of the server at this Unix socket, or 0 if it does not answer."""
    try:
        return _exchange(path, target, timeout)[0]
    except UNANSWERED:
        return 0


def _exchange(path: Path, target: str, timeout: float) -> tuple[int, str]:
    """Raises: UNANSWERED"""
    connection = HTTPConnection("localhost", timeout=timeout)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(timeout)
    try:
        connection.sock.connect(str(path))
        connection.request("GET", target)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def accepts(path: Path) -> bool:
    """Return whether a server listens at this Unix socket."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def answers(url: str, secret: str) -> bool:
    """Return whether an edge with this secret answers with a success."""
    try:
        get_signed(url, secret)
    except UNANSWERED:
        return False
    return True
