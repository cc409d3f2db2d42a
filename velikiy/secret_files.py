"""Write the folder with the passwords and with the addresses that contain them. The settings are read from it."""

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from velikiy import whole_file

REDIS_RIGHTS = "~* -@all +@read +@write +@connection +@scripting -@dangerous +time +info +flushdb +flushall"
"""The rights in Redis: entries, the scripts, and emptying. Without the commands that write files, load code, stop Redis
or make it a replica, so that a program with the password cannot leave Redis."""


SERVICES = {
    "app": ("database_url", "database_direct_url", "redis_url", "edge_secret"),
    "migrate": ("migration_database_url",),
    "postgres": ("postgres_password", "owner_password", "app_password"),
    "redis": ("redis_password", "redis.conf"),
    "edge": ("redis_url", "edge_secret"),
}
"""The files that each service needs. The relay is a service like the app."""


def write(
    folder: Path,
    *,
    postgres: str,
    redis: str,
    database_url: str | None = None,
    migration_database_url: str | None = None,
    database_direct_url: str | None = None,
    redis_url: str | None = None,
    edge_secret: str | None = None,
) -> None:
    """Write the files, and generate the passwords that are missing.

    Args:
        folder: The folder of the secrets.
        postgres: Host and port of the stack's own PostgreSQL, or the absolute path of the folder with its Unix socket.
        redis: Host and port of the stack's own Redis, or the absolute path of its Unix socket.
        database_url: The address of another PostgreSQL, which is used instead.
        migration_database_url: Its address with the role that owns the tables, if that is another role.
        database_direct_url: DATABASE_DIRECT_URL, if it is set.
        redis_url: The address of another Redis, which is used instead.
        edge_secret: EDGE_SECRET, if other stacks share the database; else it is generated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _ensure_password(folder / "postgres_password")
    owner_password = _ensure_password(folder / "owner_password")
    app_password = _ensure_password(folder / "app_password")
    redis_password = _ensure_password(folder / "redis_password")
    _replace(folder / "redis.conf", f"user default reset on >{redis_password} {REDIS_RIGHTS}")
    own_database = _own_database(postgres, "velikiy", app_password)
    owner_of_own_database = _own_database(postgres, "velikiy_owner", owner_password)
    owner = migration_database_url or database_direct_url or database_url
    _replace(folder / "migration_database_url", owner or owner_of_own_database)
    _replace(folder / "database_url", database_url or own_database)
    # With a user name, because redis-cli takes an address without one for a user with an empty name.
    own_redis = f"redis://default:{redis_password}@{redis}/0"
    if redis.startswith("/"):
        own_redis = f"unix://default:{redis_password}@{quote(redis)}?db=0"
    _replace(folder / "redis_url", redis_url or own_redis)
    (folder / "database_direct_url").unlink(missing_ok=True)
    if database_direct_url:
        _replace(folder / "database_direct_url", database_direct_url)
    if edge_secret:
        _replace(folder / "edge_secret", edge_secret)
    _ensure_password(folder / "edge_secret")


def _own_database(server: str, role: str, password: str) -> str:
    if server.startswith("/"):
        return f"postgresql://{role}:{password}@/velikiy?host={quote(server)}"
    return f"postgresql://{role}:{password}@{server}/velikiy"


def share(folder: Path, services: Path, names: Iterable[str], groups: Mapping[str, int]) -> None:
    """Give each service a folder with the files that it needs, and no others.

    Args:
        folder: The folder of the secrets.
        services: The folder with one folder for each service.
        names: The services.
        groups: The groups of services that run as other users. Only the group may read their files. To give a file to
            a group, this process has to be a member; it needs no capability.
    """
    for name in names:
        own = services / name
        own.mkdir(mode=0o700, exist_ok=True)
        group = groups.get(name)
        if group is not None:
            os.chown(own, -1, group)
            own.chmod(0o750)
        for file in SERVICES[name]:
            if (folder / file).exists():
                _replace(own / file, (folder / file).read_text().strip(), group)
            else:
                (own / file).unlink(missing_ok=True)


def _ensure_password(file: Path) -> str:
    """Return the password in the file, and write a random one if the file is missing or empty."""
    if not file.exists() or not file.read_text().strip():
        _replace(file, secrets.token_urlsafe(24))
    return file.read_text().strip()


def _replace(file: Path, text: str, group: int | None = None) -> None:
    """Write a file that its owner may read, and the group if there is one."""
    whole_file.replace(file, text + "\n", mode=0o400 if group is None else 0o440, group=group)
