"""The programs of PostgreSQL's client: psql, pg_dump, pg_restore.

Addresses with passwords pass through the environment: every user of the machine sees the arguments of a command, and
only the user of a process, and root, sees its environment.
"""

import os
import re
import shutil
from pathlib import Path

import psycopg.pq

CONNECT_TIMEOUT_S = "10"
"""A server that hangs accepts connections, and psql would wait for its reply for ever."""


class NotInstalled(Exception):
    """The program is not installed. The text is a sentence for the operator."""


def find(name: str) -> str:
    """Return the path of the newest version of a program. A pg_dump that is older than its server refuses to work.

    Raises:
        NotInstalled
    """
    # Debian's /usr/bin/pg_dump chooses the version by the clusters that Debian manages, which a stack's is not.
    versions = Path("/usr/lib/postgresql").glob(f"[0-9]*/bin/{name}")
    newest = max(versions, key=lambda program: int(re.sub(r"\D.*", "", program.parts[-3])), default=None)
    program = str(newest) if newest else shutil.which(name)
    if program is None:
        raise NotInstalled(f"{name} is not installed. Install Debian's postgresql-client")
    return program


def environment(address: str) -> dict[str, str]:
    """Return the environment of a program that connects to this address."""
    options = psycopg.pq.Conninfo.parse(address.encode())
    given = {option.envvar.decode(): option.val.decode() for option in options if option.envvar and option.val}
    return {**os.environ, "PGCONNECT_TIMEOUT": CONNECT_TIMEOUT_S, **given}
