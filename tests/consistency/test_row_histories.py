"""The history of a row that is written by API and by SQL is complete, and no edge serves an older one than was shown.

A read is judged by when it started: it shows every version that the API had acknowledged by then, and every version of
the API that an earlier read has shown. SQL from outside is invalidated by the relay, some milliseconds after it was
committed (docs/protocol.md): one edge may show it a moment before another, and it has to be in the history in the end.
"""

import os
import threading
import time

import psycopg
import requests

from testkit.stack import Stack, wait_until

SQL_EACH = 5
"""Each so many versions, SQL from outside writes one."""

WRITES = int(os.environ.get("HISTORY_WRITES", "150"))


class Floor:
    """The latest version that a read must not miss."""

    def __init__(self) -> None:
        self.version = 0
        self.lock = threading.Lock()

    def rise(self, version: int) -> None:
        with self.lock:
            self.version = max(self.version, version)


class Reader(threading.Thread):
    def __init__(self, url: str, floor: Floor) -> None:
        super().__init__(daemon=True)
        self.url, self.floor = url, floor
        self.stale: list[str] = []
        self.reads = self.hits = 0
        self.stopping = threading.Event()

    def run(self) -> None:
        with requests.Session() as session:
            while not self.stopping.is_set():
                expected = self.floor.version
                response = session.get(self.url, timeout=10)
                items = response.json()
                versions = [item["version"] for item in items]
                complete = [*range(versions[0], versions[0] - len(versions), -1)]
                if versions[0] < expected or versions != complete:
                    self.stale.append(f"expected {expected}, got {versions[:5]} of {response.headers['Cache-Status']}")
                if versions[0] % SQL_EACH:
                    self.floor.rise(versions[0])
                self.reads += 1
                self.hits += response.headers["X-Cache-Status"] == "HIT"


def test_history_of_a_row_that_is_written_by_api_and_sql_is_complete_and_never_stale(stack: Stack) -> None:
    email = f"history{time.time_ns()}@example.com"
    body = {"name": "Version 1", "email": email}
    user = requests.post(f"{stack.edge}/users", json=body, timeout=5).json()["id"]
    floor = Floor()
    readers = [Reader(f"{edge}/users/{user}/history?limit=20", floor) for edge in stack.edges for _ in range(2)]
    for reader in readers:
        reader.start()
    written = {1: "Version 1"}
    try:
        with requests.Session() as session, psycopg.connect(stack.postgres, autocommit=True) as sql:
            for number in range(2, WRITES):
                row = f"{stack.edges[number % 2]}/users/{user}"
                name = f"Version {number}"
                if not written[number - 1]:
                    put = session.put(row, json={**body, "name": name}, headers={"If-None-Match": "*"}, timeout=10)
                    assert put.status_code == 201, put.text
                elif number % SQL_EACH == 0:
                    sql.execute("UPDATE users SET name = %s WHERE id = %s", (name, user))
                elif number % 31 == 0:
                    assert session.delete(row, timeout=10).status_code == 200
                    name = ""
                else:
                    assert session.patch(row, json={"name": name}, timeout=10).status_code == 200
                written[number] = name
                if number % SQL_EACH:
                    floor.rise(number)
                    time.sleep(0.002 * (number % 3))
    finally:
        for reader in readers:
            reader.stopping.set()
        for reader in readers:
            reader.join()
        requests.delete(f"{stack.edge}/users/{user}", timeout=5)
    assert [problem for reader in readers for problem in reader.stale] == []
    assert all(reader.reads for reader in readers)
    assert sum(reader.hits for reader in readers)

    def is_complete() -> bool:
        items = requests.get(f"{stack.edge}/users/{user}/history", timeout=5).json()
        shown = {item["version"]: item["row"]["name"] if item["row"] else "" for item in items[1:]}
        return shown == written

    wait_until(is_complete, within=5)
