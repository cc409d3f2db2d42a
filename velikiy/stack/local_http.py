"""Requests to the servers of the stack. They pass no proxy, even if http_proxy names one."""

import ssl
import urllib.request
from http.client import HTTPException

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


def answers(url: str) -> bool:
    try:
        get(url)
    except UNANSWERED:
        return False
    return True
