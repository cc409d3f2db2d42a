"""The account of this app for the console's page Live. An edge requests it for the relay (edge/lua/live.lua).

The counts are those of all processes that count into one folder: the workers of a container, or of a whole stack
without Docker. The relay adds up each folder once.
"""

import os
import socket
import time
from pathlib import Path

import orjson
from flask import Flask, Response, request

from velikiy import metrics
from velikiy.coherence import EdgeTier
from velikiy.coherence.host import HOST, started_at
from velikiy.findings.machine import memory_of
from velikiy.resources.problems import Problem
from velikiy.signatures import HEADER

MEMORY_S = 10.0
"""Seconds for which a measurement of memory counts: the kernel walks through every page of each worker."""


def install(app: Flask, edge_tier: EdgeTier) -> None:
    signer = edge_tier.signer
    measured = [0.0, 0]

    @app.get("/.live")
    def live() -> Response:
        """Return one JSON object on one line. Clients cannot send this request."""
        mac = signer.request_mac(request.headers.get(HEADER, ""), "GET", "/.live")
        if mac is None:
            raise Problem("not-found", "Nothing exists at this address.")
        if time.monotonic() - measured[0] > MEMORY_S:
            measured[:] = time.monotonic(), memory_of(os.getppid())
        body = orjson.dumps({**_account(), "memory": measured[1]})
        return Response(body, headers={HEADER: signer.response_mac(mac, 200, body.decode())})


def _account() -> dict[str, object]:
    master = os.getppid()
    own_socket = os.environ.get("APP_SOCKET")
    return {
        # The hostname is that of the container, and the same after a restart of the container.
        "name": Path(own_socket).stem if own_socket else socket.gethostname(),
        "started": started_at(master),
        "workers": _children(master),
        "folder": f"{HOST} {metrics.folder_id()}",
        "drops": metrics.drops_of_folder(),
    }


def _children(pid: int) -> int:
    try:
        return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return 0
