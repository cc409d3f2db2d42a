"""Write the folder with the passwords and with the addresses that contain them. The settings are read from it."""

import secrets
from pathlib import Path

REDIS_RIGHTS = "~* -@all +@read +@write +@connection +@scripting -@dangerous +time +info +flushdb +flushall"
"""The rights in Redis: entries, the scripts, and emptying. Without the commands that write files, load code, stop Redis
or make it a replica, so that a program with the password cannot leave Redis."""


def write(
    folder: Path,
    *,
    postgres: str,
    redis: str,
    database_url: str | None = None,
    database_direct_url: str | None = None,
    redis_url: str | None = None,
    edge_secret: str | None = None,
    edge: Path | None = None,
    mode: int = 0o444,
) -> None:
    """Write the files, and generate the passwords that are missing.

    Args:
        folder: The folder of the secrets.
        postgres: Host and port of the stack's own PostgreSQL.
        redis: Host and port of the stack's own Redis.
        database_url: The address of another PostgreSQL, which is used instead.
        database_direct_url: DATABASE_DIRECT_URL, if it is set.
        redis_url: The address of another Redis, which is used instead.
        edge_secret: EDGE_SECRET, if other stacks share the database; else it is generated.
        edge: A folder for the secrets of the edge: Redis' address and EDGE_SECRET, and not PostgreSQL's address.
        mode: Permissions of the files. Containers read them as different users, from a volume that only they mount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _ensure_password(folder / "postgres_password", mode)
    app_password = _ensure_password(folder / "app_password", mode)
    redis_password = _ensure_password(folder / "redis_password", mode)
    # With a user name, because redis-cli takes an address without one for a user with an empty name.
    own_redis = f"redis://default:{redis_password}@{redis}/0"
    _replace(folder / "redis.conf", f"user default reset on >{redis_password} {REDIS_RIGHTS}", mode)
    _replace(folder / "database_url", database_url or f"postgresql://velikiy:{app_password}@{postgres}/velikiy", mode)
    (folder / "database_direct_url").unlink(missing_ok=True)
    if database_direct_url:
        _replace(folder / "database_direct_url", database_direct_url, mode)
    _replace(folder / "redis_url", redis_url or own_redis, mode)
    if edge_secret:
        _replace(folder / "edge_secret", edge_secret, mode)
    edge_secret = _ensure_password(folder / "edge_secret", mode)
    if edge:
        _replace(edge / "redis_url", own_redis, mode)
        _replace(edge / "edge_secret", edge_secret, mode)


def _ensure_password(file: Path, mode: int) -> str:
    """Return the password in the file, and write a random one if the file is missing."""
    if not file.exists():
        _replace(file, secrets.token_urlsafe(24), mode)
    return file.read_text().strip()


def _replace(file: Path, text: str, mode: int) -> None:
    """Replace the file as a whole: a reader never sees half of it."""
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)
    new.touch(mode)
    new.chmod(0o600)
    new.write_text(text + "\n")
    new.chmod(mode)
    new.replace(file)
