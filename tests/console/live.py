"""Reads the stream of the page Live, and opens pages with a key."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import requests

MOMENT, NGINX, REDIS, POSTGRES, STALE, WRITE, FAILED, OTHER = range(8)
NGINX_P50, POSTGRES_P99, DROPS_P50, DROPS, OUTSIDE = 8, 16, 17, 20, 21
"""The members of a sample (velikiy/relay/live.py)."""


def events(edge: str, key: str = "", last: str = "", within: float = 20) -> Iterator[dict[str, Any]]:
    """Yield the events of the stream of this edge, each with its id."""
    headers = {"Accept": "text/event-stream", "Last-Event-ID": last, "Authorization": f"Bearer {key}"}
    headers = {name: value for name, value in headers.items() if value not in ("", "Bearer ")}
    until = time.monotonic() + within
    with closing(requests.get(f"{edge}/console/live", headers=headers, stream=True, timeout=10)) as response:
        assert response.status_code == 200, response.text
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        newest = ""
        for line in response.iter_lines(chunk_size=1):
            if line.startswith(b"id: "):
                newest = line[4:].decode()
            elif line.startswith(b"data: "):
                yield {**json.loads(line[6:]), "id": newest}
            assert time.monotonic() < until, "no such event"
