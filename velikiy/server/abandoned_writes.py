"""Discard a write whose client hung up while the write was waiting.

An edge closes its connection to the app when its client hangs up. That client may have sent the write again through
another app, so the first write must not be carried out later. Only edges are treated so: an edge never closes only its
sending side, but other clients may do that and wait for the response.
"""

import errno
from typing import Any

from velikiy.hang_ups import is_hung_up

DEADLINE_HEADER = "Write-Deadline"
"""The header field that every edge sends with a write, and no other client."""


def discard(worker: Any, request: Any) -> None:
    """Refuse an abandoned write: gunicorn's hook `pre_request`, for gunicorn's own worker.

    Raises:
        ConnectionResetError: The write is abandoned. gunicorn closes the connection and does not call the app.
    """
    is_from_edge = any(name == DEADLINE_HEADER.upper() for name, _ in request.headers)
    if is_from_edge and is_hung_up(request.unreader.sock):
        worker.log.info("write.abandoned")
        raise ConnectionResetError(errno.ECONNRESET, "the client has hung up")
