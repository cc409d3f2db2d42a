"""The folder with the passwords and the addresses that hold them, from which settings are read."""

import secrets
from pathlib import Path


def write(
    folder: Path,
    *,
    postgres: str,
    redis: str,
    database_url: str | None = None,
    redis_url: str | None = None,
    edge: Path | None = None,
    mode: int = 0o444,
) -> None:
    """`postgres` and `redis`: hosts and ports of our own servers; an URL stands for one that is somebody else's.
    `mode` of the files: containers read them as different users, from a volume that only they mount."""
    folder.mkdir(parents=True, exist_ok=True)

    def keep(name: str, text: str) -> str:
        file = folder / name
        if not file.exists():
            put(name, text)
        return file.read_text().strip()

    def put(name: str, text: str, folder: Path = folder) -> None:
        new = folder / f".{name}.new"
        new.unlink(missing_ok=True)
        new.touch(mode)
        new.chmod(0o600)
        new.write_text(text + "\n")
        new.chmod(mode)
        new.replace(folder / name)  # whole or not at all

    keep("postgres_password", secrets.token_urlsafe(24))
    app = keep("app_password", secrets.token_urlsafe(24))
    cache = keep("redis_password", secrets.token_urlsafe(24))
    put("redis.conf", f"requirepass {cache}")
    put("database_url", database_url or f"postgresql://velikiy:{app}@{postgres}/velikiy")
    put("redis_url", redis_url or f"redis://:{cache}@{redis}/0")
    if edge:
        put("redis_url", f"redis://:{cache}@{redis}/0", edge)
