"""Create a private PostgreSQL cluster once, and its database. No step damages a cluster that exists."""

import shutil
import subprocess
import time
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from velikiy.postgres import CONNECT_OPTIONS
from velikiy.stack import Refusal
from velikiy.stack.plan import Plan


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


def create_database(plan: Plan, *, within: float) -> None:
    """Wait for the server, then create the role and the database of the app if they are missing.

    The app's role is no superuser: it owns its database and nothing else.

    Raises:
        Refusal: The server does not start within this time.
    """
    app_password = plan.secret("app_password")
    with _connect_as_superuser(plan, within) as connection:
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'velikiy'").fetchone():
            connection.execute(sql.SQL("CREATE ROLE velikiy LOGIN PASSWORD {}").format(app_password))
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'velikiy'").fetchone():
            connection.execute("CREATE DATABASE velikiy OWNER velikiy")


def _connect_as_superuser(plan: Plan, within: float) -> psycopg.Connection:
    password = plan.secret("postgres_password")
    server = make_conninfo(host=str(plan.sockets), user="postgres", password=password, dbname="postgres")
    deadline = time.monotonic() + within
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
