"""Every metric of the apps and the relay, in the format of Prometheus.

A process counts into files of its own, in a folder in memory that all processes of a stack or of a container share
(PROMETHEUS_MULTIPROC_DIR, the library's own variable). The scrape target reads the files of all processes and adds them
up. Without the folder each process counts for itself, which costs little and shows nothing.

A label has few values: a route and never a path, a cause that the log has too. docs/monitoring.md explains each metric.
"""

import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, start_http_server, values
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.utils import floatToGoString

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

FILE_BYTES = 256 * 1024
"""Memory of one file. It is taken when the file is created: if it could not be had later, the kernel would end the
process."""

KINDS = ("counter", "histogram", "gauge_livesum", "gauge_livemostrecent")

SAMPLE_INTERVAL_S = 1.0


class Slots:
    """Gives each process a number under which it counts: the lowest number that no living process has.

    The library would take the process id. A process that is restarted each second would then leave files each second.
    With a number that is used again, the files are as many as the processes at one time, a counter goes on where the
    process before has stopped, and containers with a common folder do not mix up their process ids. A lock that the
    kernel releases when its process ends shows whether the number is in use.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._slot, self._lock = -1, -1
        # The library calls `own` for each number that it counts, so a fork is not noticed by the process id.
        os.register_at_fork(after_in_child=self._begin_in_child)

    def _begin_in_child(self) -> None:
        """Forget the number of the parent: a fork does not inherit the lock."""
        self._slot, self._lock = -1, -1

    def own(self) -> int:
        if self._slot < 0:
            self._slot, self._lock = self._claim()
        return self._slot

    def _claim(self) -> tuple[int, int]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        slot = 0
        while (lock := self._try_to_lock(slot)) is None:
            slot += 1
        mark_process_dead(slot, str(self.folder))  # type: ignore[no-untyped-call]
        for kind in KINDS:
            file = os.open(self.folder / f"{kind}_{slot}.db", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(file, 0, FILE_BYTES)
            finally:
                os.close(file)
        return slot, lock

    def _try_to_lock(self, slot: int) -> int | None:
        lock = os.open(self.folder / f"{slot}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        return lock

    def forget_the_state_of_dead_processes(self) -> None:
        """Remove the gauges of processes that have ended. Their counters stay."""
        own = self._slot  # to close a lock of our own would release it
        for file in self.folder.glob("*.lock"):
            slot = int(file.stem)
            if slot != own and (lock := self._try_to_lock(slot)) is not None:
                mark_process_dead(slot, str(self.folder))  # type: ignore[no-untyped-call]
                os.close(lock)


values.ValueClass = values.MutexValue
_slots = None
if (_folder := os.environ.get(FOLDER_VARIABLE)) and os.environ.get("METRICS") != "off":
    with suppress(OSError):  # no memory for the files: the service goes on without metrics
        _slots = Slots(Path(_folder))
        values.ValueClass = values.MultiProcessValue(_slots.own)  # type: ignore[no-untyped-call]

registry = CollectorRegistry()
"""Not the library's own registry: with --reload this module is loaded twice."""


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"velikiy_{name}", text, labels, registry=registry)


def _state(name: str, text: str, *labels: str) -> Gauge:
    """A state of one process. The states of all living processes are added up."""
    return Gauge(f"velikiy_{name}", text, labels, registry=registry, multiprocess_mode="livesum")


def _common_state(name: str, text: str, *labels: str) -> Gauge:
    """A state of the whole service. The newest report of a living process counts."""
    return Gauge(f"velikiy_{name}", text, labels, registry=registry, multiprocess_mode="livemostrecent")


def _duration(name: str, text: str, *labels: str) -> Histogram:
    return Histogram(f"velikiy_{name}_seconds", text, labels, registry=registry, buckets=DURATION_BUCKETS_S)


DURATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""Also in edge/lua/metrics.lua."""

# ---- an app ----

APP_REQUESTS = _counter("app_requests", "Requests that an app has answered.", "method", "route", "code")
APP_DURATION = _duration("app_request_duration", "Time of a request in an app.", "route", "tier")
APP_THREADS = _state("app_threads", "Threads of the apps that serve requests.", "state")
APP_QUEUED = _state("app_queued_requests", "Requests that wait for their share of the threads.", "share")
APP_WORKER_STARTS = _counter("app_worker_starts", "Worker processes of the apps that have started.")

# ---- PostgreSQL ----

POOL_CONNECTIONS = _state("pool_connections", "Connections to PostgreSQL.", "pool", "state")
POOL_WAITING = _state("pool_waiting_requests", "Requests that wait for a connection to PostgreSQL.", "pool")
DATABASE_FAILURES = _counter("database_failures", "Times that PostgreSQL did not answer in time.", "pool", "cause")
DEADLOCKS = _counter("deadlocks", "Transactions that PostgreSQL has ended to break a deadlock.")

# ---- coherence ----

DROP_DURATION = _duration("drop_duration", "Time of a writer from its drop to the acknowledgement of every cache.")
DROP_ROUNDS = _counter("drop_rounds", "Rounds of drops. Writers that contend share a round (group commit).")
UNACKNOWLEDGED = _counter("unacknowledged_drops", "Drops that a cache did not acknowledge.", "cache", "cause")
FENCES = _counter("fences", "Caches that were fenced.", "cache")
EXCLUSION_WAIT = _duration("exclusion_wait_duration", "Time of a writer until a fenced cache is excluded.")
REFUSED_WAITS = _counter("refused_exclusion_waits", "Writes that were refused because too many wait for an exclusion.")
LATE_WRITES = _counter("late_writes", "Writes that were not carried out because their deadline had passed.")
REDIS_READS = _counter("redis_reads", "Reads of Redis by apps.", "result")
REDIS_FAILURES = _counter(
    "redis_failures", "Times that Redis did not answer, each of which opens the breaker.", "during"
)
BREAKER_OPEN = _state("redis_breaker_open", "Processes that leave Redis alone at the moment, because it has failed.")

# ---- the relay, which reports the state that all processes share ----

RELAYS_LISTENING = _state("relays_listening", "Relays that listen to PostgreSQL.")
RELAY_DISCONNECTIONS = _counter("relay_disconnections", "Times that a relay has lost its connection to PostgreSQL.")
RELAY_NOTIFICATIONS = _counter("relay_notifications", "Notifications of SQL from outside.")
RELAY_LAG = _duration(
    "relay_lag", "Time from a notification of SQL from outside to the acknowledgement of every cache."
)
RELAY_QUEUE = _common_state("relay_queue_usage_ratio", "Share of PostgreSQL's queue of notifications that is in use.")
RELAY_ANSWERED_AT = _common_state("relay_last_answer_timestamp_seconds", "When PostgreSQL last answered a relay.")
TABLES_WITHOUT_TRIGGERS = _common_state("tables_without_triggers", "Tables whose changes by SQL are not notified.")
CACHES = _common_state("caches", "Caches by their state in the table `caches`.", "kind", "state")
REDIS_UP = _common_state("redis_up", "1 if Redis answers the relay.")
REDIS_MEMORY = _common_state("redis_memory_bytes", "Memory that Redis uses.")
REDIS_MAX_MEMORY = _common_state("redis_max_memory_bytes", "Memory that Redis may use for entries.")
REDIS_EVICTIONS = _counter("redis_evictions", "Entries that Redis has evicted to make room.")


# ---- reporting ----

_samplers: list[Callable[[], None]] = []


def watch(sample: Callable[[], None]) -> None:
    """Call this function each second from now on. It sets gauges, whose values cannot be computed when they are
    read: another process reads them."""
    if _slots is None:
        return
    _samplers.append(sample)
    if len(_samplers) == 1:
        threading.Thread(target=_keep_sampling, name="metrics", daemon=True).start()


def _keep_sampling() -> None:
    while True:
        for sample in _samplers:
            with suppress(Exception):  # a state that cannot be had now is had a second later
                sample()
        time.sleep(SAMPLE_INTERVAL_S)


class Collector:
    """Adds up the metrics of all processes that count into a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._slots = _slots if _slots and _slots.folder == folder else Slots(folder)
        self._files = MultiProcessCollector(None, str(folder))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Metric]:
        self._slots.forget_the_state_of_dead_processes()
        return cast(Iterable[Metric], self._files.collect())  # type: ignore[no-untyped-call]


_DROP_KEYS = {
    mmap_key(
        "velikiy_drop_duration_seconds",
        "velikiy_drop_duration_seconds_bucket",
        ["le"],
        [floatToGoString(bound)],  # type: ignore[no-untyped-call]
        "Time of a writer from its drop to the acknowledgement of every cache.",
    ): bucket
    for bucket, bound in enumerate((*DURATION_BUCKETS_S, float("inf")))
}


def folder_id() -> str:
    """Name the folder that this process counts into, "" without one. The same name means the same counts."""
    if _slots is None:
        return ""
    found = _slots.folder.stat()
    return f"{found.st_dev}:{found.st_ino}"


def drops_of_folder() -> list[float]:
    """Return the number of drops in each bucket of DROP_DURATION, of all processes that count into the folder.

    Gains: a fraction of the time of the library's collector, which parses every sample of every file.
    Relies on: the key under which the library keeps a sample (`mmap_key`).
    """
    counts = [0.0] * len(_DROP_KEYS)
    for file in _slots.folder.glob("histogram_*.db") if _slots else ():
        with suppress(OSError, ValueError, IndexError, struct.error):  # a process is just starting
            for key, count, *_ in MmapedDict.read_all_values_from_file(str(file)):  # type: ignore[no-untyped-call]
                if (bucket := _DROP_KEYS.get(key)) is not None:
                    counts[bucket] += count
    return counts


def count_of(counter: Counter) -> float:
    """Return what this process has counted."""
    return next(sample.value for family in counter.collect() for sample in family.samples)


def serve() -> None:
    """Serve the metrics of all processes of this container at METRICS_LISTEN, an address that clients must not reach.
    Without METRICS_LISTEN the launcher has a scrape target for the whole stack (velikiy/stack/scrape_target.py)."""
    listen = os.environ.get("METRICS_LISTEN")
    if not listen or _slots is None:
        return
    host, _, port = listen.rpartition(":")
    target = CollectorRegistry()
    target.register(Collector(_slots.folder))

    def begin() -> None:
        while True:  # until a worker of this number that is about to end has closed its listener
            with suppress(OSError):
                start_http_server(int(port), host.strip("[]"), target)
                return
            time.sleep(SAMPLE_INTERVAL_S)

    threading.Thread(target=begin, name="scrape target", daemon=True).start()
