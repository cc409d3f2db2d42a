"""Clients that read and write without a pause, and note each request that fails."""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from urllib.parse import urlsplit

MAX_IDLE_S = 1.0
"""A client opens another connection after this time. On a busy machine a thread may stand still for seconds, and an edge
that is reloaded closes connections that were idle for two (velikiy/stack/rolling.py:CLOSING_S)."""

_numbers = count(1)


class SteadyLoad:
    """Readers and writers, half of them with a connection of their own for each request. A writer reads back each of
    its writes, so a stale read counts as a failure too."""

    def __init__(self, urls: list[str], *, clients: int = 8) -> None:
        self.failures: list[str] = []
        self.done: Counter[str] = Counter()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(urls[n % len(urls)], n % 4 < 2, n % 2 == 0))
            for n in range(clients)
        ]

    def _run(self, url: str, keeps_connection: bool, writes: bool) -> None:
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
        last_response = time.monotonic()

        def request(method: str, path: str, **body: str) -> dict[str, object]:
            nonlocal last_response
            if time.monotonic() - last_response > MAX_IDLE_S:
                connection.close()
            try:
                headers = {"Content-Type": "application/json"} if body else {}
                connection.request(method, path, json.dumps(body) if body else None, headers)
                response = connection.getresponse()
                text = response.read()
                last_response = time.monotonic()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self.failures.append(f"{method} {path}: {error!r}")
                return {}
            if not keeps_connection:
                connection.close()
            if response.status >= 400 or response.getheader("X-Cache-Status") == "STALE":
                self.failures.append(f"{method} {path}: {response.status} {text[:300]!r}")
            self.done[method] += 1
            return json.loads(text) if isinstance(json.loads(text), dict) else {}

        work: Callable[[], None]
        if writes:
            number = next(_numbers)
            created = request("POST", "/users", name="Load", email=f"steady{number}@example.com")
            path = f"/users/{created.get('id')}"
            names = (f"Load {change}" for change in count(1))

            def work() -> None:
                name = next(names)
                request("PUT", path, name=name)
                found = request("GET", path)
                if found and found.get("name") != name:
                    self.failures.append(f"stale read of {path}: {found.get('name')} instead of {name}")
        else:

            def work() -> None:
                request("GET", "/users/1")
                request("GET", "/users?limit=3")

        while not self._ended.is_set():
            work()
        if writes:
            request("DELETE", path)
        connection.close()

    @contextmanager
    def running(self) -> Iterator["SteadyLoad"]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            for thread in self._threads:
                thread.join()
