"""Create a private PostgreSQL cluster once, its database and its roles. No step damages a cluster that exists.

psycopg is imported where it is needed: at the top it would delay each command of `./run` by a sixth of a second.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from velikiy.stack import Refusal
from velikiy.stack.plan import Plan

if TYPE_CHECKING:
    import psycopg

ROOT = Path(__file__).parent.parent.parent

LOCK_TIMEOUT_MS = 300


def binaries(cluster: Path) -> Path:
    """Return the folder of the PostgreSQL programs that fit this cluster. A new cluster gets the newest programs.

    Raises:
        Refusal: The cluster needs a major version that is not installed, or PostgreSQL is not installed.
    """
    folders = [initdb.parent for initdb in Path("/usr/lib/postgresql").glob("[0-9]*/bin/initdb")]
    installed = {int(folder.parent.name): folder for folder in folders}
    if not installed:
        raise Refusal("PostgreSQL is not installed: /usr/lib/postgresql/*/bin is missing. Install Debian's postgresql.")
    version_file = cluster / "PG_VERSION"
    if not version_file.exists():
        return installed[max(installed)]
    version = version_file.read_text().strip()
    if not version.isdigit() or int(version) not in installed:
        available = ", ".join(map(str, sorted(installed)))
        raise Refusal(
            f"The data in {cluster} was made by PostgreSQL {version}, but this machine has {available}. Install "
            f"postgresql-{version}, or move the data with its pg_dump to a new folder (--data). Nothing was changed."
        )
    return installed[int(version)]


def create(plan: Plan, programs: Path) -> None:
    """Run initdb in a temporary folder and rename the folder, so that a cluster exists completely or not at all.

    Raises:
        Refusal: initdb failed.
    """
    new = plan.home / "postgres.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    password = plan.secrets_folder / "postgres_password"
    initdb = subprocess.run(
        [
            *[str(programs / "initdb"), "-D", str(new), "--username=postgres", f"--pwfile={password}"],
            # UTF-8 and a locale that knows all letters: in the locale C, lower('ГЛЕБ') is 'ГЛЕБ'.
            *["--encoding=UTF8", "--locale=C.UTF-8", "--auth=scram-sha-256", "--no-instructions"],
            "--data-checksums",  # so that PostgreSQL notices a disk that returns other data than it stored
        ],
        cwd=plan.home,
        capture_output=True,
        text=True,
        check=False,
    )
    if initdb.returncode != 0:
        shutil.rmtree(new, ignore_errors=True)
        raise Refusal(f"PostgreSQL's initdb failed: {initdb.stderr.strip().splitlines()[-1]}")
    new.rename(plan.cluster)


def await_server(plan: Plan, *, within: float) -> None:
    """
    Raises:
        Refusal: The server does not start within this time.
    """
    _connect(plan, "postgres", within).close()


def checkpoint(plan: Plan) -> None:
    """Write what a stop would have to write, while the server still answers."""
    import psycopg

    with contextlib.suppress(Refusal, psycopg.Error), _connect(plan, "postgres", 0) as connection:
        connection.execute("CHECKPOINT")


def create_database(plan: Plan, *, within: float) -> None:
    """Create the database and its roles, or bring them up to date.

    The role `velikiy_owner` owns the database and its tables. The role of the apps, `velikiy`, owns nothing.

    Raises:
        Refusal: The server does not answer, or a transaction keeps a table locked for so long.
    """
    deadline = time.monotonic() + within
    with _connect(plan, "postgres", within) as connection:
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'velikiy'").fetchone():
            connection.execute("CREATE DATABASE velikiy")
    with _connect(plan, "velikiy", within) as connection:
        connection.execute("SELECT set_config('velikiy.secrets', %s, false)", (str(plan.secrets_folder),))
        connection.execute("SET velikiy.app_role = 'velikiy'")
        # A statement that waits for the lock of a table keeps others from it. Requests can wait that long.
        connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_MS}ms'")
        while not _update_roles(connection):
            if time.monotonic() >= deadline:
                raise Refusal(
                    "A transaction in the database velikiy keeps a table locked, so the tables cannot get their new "
                    "owner. Wait until the export, the import or the psql session ends, and start again."
                )
            time.sleep(LOCK_TIMEOUT_MS / 1000)


def _update_roles(connection: psycopg.Connection) -> bool:
    """Run roles.sql and grants.sql, both or none: running apps never lack a right. Return whether no lock was in the
    way."""
    import psycopg

    try:
        with connection.transaction():
            for file in ("deploy/postgres/roles.sql", "migrations/sql/grants.sql"):
                connection.execute((ROOT / file).read_bytes())
    except psycopg.errors.LockNotAvailable:
        return False
    return True


def _connect(plan: Plan, database: str, within: float) -> psycopg.Connection:
    """Connect as the superuser."""
    import psycopg
    from psycopg.conninfo import make_conninfo

    from velikiy.postgres import CONNECT_OPTIONS

    deadline = time.monotonic() + within
    password = plan.secret("postgres_password")
    server = make_conninfo(host=str(plan.sockets), user="postgres", password=password, dbname=database)
    while True:
        try:
            return psycopg.connect(server, **CONNECT_OPTIONS, autocommit=True)
        except psycopg.OperationalError as error:
            if time.monotonic() >= deadline:
                log = plan.logs / "postgres.log"
                raise Refusal(
                    f"PostgreSQL did not start within {within:g} s: {str(error).strip()}. See {log}."
                ) from None
            time.sleep(0.03)
