"""One worker of each app looks after the relay and PostgreSQL, because the relay cannot report its own end."""

import threading
import time
from contextlib import suppress
from typing import Any

from velikiy.findings.announcer import Announcer
from velikiy.findings.postgres import Diagnosis, relay
from velikiy.postgres import Database, DatabaseUnavailable

INTERVAL_S = 1.0


def begin(worker: Any) -> None:
    """Start the thread: gunicorn's hook `post_worker_init`."""
    app = worker.app.wsgi()
    database = getattr(app, "extensions", {}).get("velikiy.database") if worker.number == 0 else None
    if database:  # not an app of another program, or one that could not be loaded
        threading.Thread(target=_watch, args=[database], name="watch", daemon=True).start()


def _watch(database: Database) -> None:
    announcer, diagnosis = Announcer(), Diagnosis(database.dsn)
    while True:
        time.sleep(INTERVAL_S)
        with suppress(Exception):  # a look that fails is repeated
            try:
                with database.reserved() as connection:
                    found = relay(connection)
            except DatabaseUnavailable:
                found = [diagnosis.finding(within=0)]
            announcer.report(found)
