"""Each worker of an app notes whether PostgreSQL answers it. One of them also looks after the relay, because the relay
cannot report its own end."""

import threading
import time
from contextlib import suppress
from typing import Any

from velikiy.findings.announcer import Announcer
from velikiy.findings.postgres import Diagnosis, relay
from velikiy.postgres import Database, DatabaseUnavailable

INTERVAL_S = 1.0

RELAY_RESTART_S = 4.0
"""A relay that `./run up` or `./run restart` replaces is away for so long on a busy machine, which is no error."""


def begin(worker: Any) -> None:
    """Start the thread: gunicorn's hook `post_worker_init`."""
    app = worker.app.wsgi()
    database = getattr(app, "extensions", {}).get("velikiy.database")
    if database:  # None for an app of another program, and for one that could not be loaded
        announcer = Announcer(RELAY_RESTART_S) if worker.number == 0 else None
        threading.Thread(target=_watch, args=[database, announcer], name="watch", daemon=True).start()


def _watch(database: Database, announcer: Announcer | None) -> None:
    """Note for the edges whether PostgreSQL answers, and log findings if there is an announcer."""
    diagnosis = Diagnosis(database.dsn)
    while True:
        time.sleep(INTERVAL_S)
        with suppress(Exception):  # a look that fails is repeated
            try:
                with database.reserved() as connection:
                    connection.execute("SELECT 1")
                    database.is_silent = False
                    found = relay(connection) if announcer else []
            except DatabaseUnavailable as error:
                database.is_silent = error.is_silent
                found = [diagnosis.finding(within=0)] if announcer and error.is_silent else []
            if announcer:
                announcer.report(found)
