"""A private PostgreSQL cluster: made once, never damaged."""

import shutil
import subprocess
import time
from pathlib import Path

import psycopg
from psycopg import sql

from velikiy.postgres import OURS
from velikiy.stack import Refusal
from velikiy.stack.plan import Plan


def binaries(cluster: Path) -> Path:
    """Where the programs are that fit this cluster, or for a new one the newest.

    Raises:
        Refusal: the cluster is of another major version, or PostgreSQL is not installed.
    """
    programs = [initdb.parent for initdb in Path("/usr/lib/postgresql").glob("[0-9]*/bin/initdb")]
    installed = {int(folder.parent.name): folder for folder in programs}
    if not installed:
        raise Refusal("PostgreSQL is not installed: /usr/lib/postgresql/*/bin is missing. Install Debian's postgresql.")
    made_by = cluster / "PG_VERSION"
    if not made_by.exists():
        return installed[max(installed)]
    version = made_by.read_text().strip()
    if not version.isdigit() or int(version) not in installed:
        have = ", ".join(map(str, sorted(installed)))
        raise Refusal(
            f"The data in {cluster} was made by PostgreSQL {version}, but this machine has {have}. Install "
            f"postgresql-{version}, or move the data with its pg_dump to a new folder (--data). Nothing was changed."
        )
    return installed[int(version)]


def create(plan: Plan, programs: Path) -> None:
    """initdb beside the final place, then a rename: a cluster is there whole or not at all."""
    new = plan.home / "postgres.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    password = plan.passwords / "postgres_password"
    made = subprocess.run(
        [
            *[str(programs / "initdb"), "-D", str(new), "--username=postgres", f"--pwfile={password}"],
            # UTF-8 and a locale that knows all its letters: in C, lower('ГЛЕБ') is 'ГЛЕБ'.
            *["--encoding=UTF8", "--locale=C.UTF-8", "--auth=scram-sha-256", "--no-instructions"],
            "--data-checksums",  # a disk that lies is found out, not believed
        ],
        cwd=plan.home,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        shutil.rmtree(new, ignore_errors=True)
        raise Refusal(f"PostgreSQL's initdb failed: {made.stderr.strip().splitlines()[-1]}")
    new.rename(plan.cluster)


def create_database(plan: Plan, *, within: float) -> None:
    """Wait for the server; then the role and the database of the app where they are missing.

    The app's role is no superuser: it owns its database and nothing else.

    Raises:
        Refusal: the server does not come up.
    """
    password = plan.secret("postgres_password")
    app_password = plan.secret("app_password")
    server = f"postgresql://postgres:{password}@127.0.0.1:{plan.postgres_port}/postgres"
    with _connect(server, plan, within) as connection:
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'velikiy'").fetchone():
            connection.execute(sql.SQL("CREATE ROLE velikiy LOGIN PASSWORD {}").format(app_password))
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'velikiy'").fetchone():
            connection.execute("CREATE DATABASE velikiy OWNER velikiy")


def _connect(server: str, plan: Plan, within: float) -> psycopg.Connection:
    until = time.monotonic() + within
    while True:
        try:
            return psycopg.connect(server, **OURS, autocommit=True)
        except psycopg.OperationalError as error:
            if time.monotonic() >= until:
                log = plan.logs / "postgres.log"
                raise Refusal(
                    f"PostgreSQL did not start within {within:g} s: {str(error).strip()}. See {log}."
                ) from None
            time.sleep(0.03)
