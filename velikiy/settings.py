"""Every knob of the service, typed, read once, refused by name.

Sources, the first that has a value wins: the environment, `.env` in the working directory, files in the
secrets folder (`database_url`, `redis_url`; /run/secrets in containers). An empty value counts as not set.
`.env.example` documents each with unit, default and effect; a test keeps the two in step.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

SECRETS = Path("/run/secrets")


class BadSetting(Exception):
    """A setting that cannot be used; the text names the key, the value and what is allowed."""


def _postgres_dsn(value: str) -> str:
    # Here and not above, as redis below: the launcher, which mostly has no address to check, starts twice for each
    # command, and with these two 0.2 s later.
    import psycopg.conninfo

    try:
        psycopg.conninfo.conninfo_to_dict(value)
    except psycopg.Error:
        raise ValueError("a PostgreSQL address such as postgresql://user:password@host:5432/database") from None
    return value


def _redis_url(value: str) -> str:
    import redis

    try:
        # Unknown options come to light only when a connection is made (which connects nowhere yet).
        pool = redis.ConnectionPool.from_url(value)
        pool.make_connection()
        number = "" if value.startswith("unix:") else urlsplit(value).path.strip("/")
        fits = (number.isdigit() or not number) and not pool.connection_kwargs.get("decode_responses")
    except (ValueError, TypeError, redis.exceptions.RedisError):
        fits = False
    if not fits:
        raise ValueError("a Redis address such as redis://:password@host:6379/0")
    return value


class ServiceSettings(BaseSettings):
    """What the services need to know but for each other's addresses. Field names in capitals are the names of the
    environment variables."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    redis_ttl: int = Field(60, ge=1, le=86_400)
    """Seconds that an entry lives in Redis, counted from its first fill."""

    edge_ttl: int = Field(5, ge=1, le=3_600)
    """Seconds that Nginx serves a stored response without asking the app."""

    edge_memory: int = Field(128, ge=4, le=65_536)
    """Megabytes of one edge for the answers that it keeps."""

    app_workers: int = Field(2, ge=1, le=64)
    """Processes of one app instance."""

    app_threads: int = Field(8, ge=1, le=256)
    """Threads of each process: that many requests wait for PostgreSQL or Redis at the same time."""

    app_first_cpu: int | None = Field(None, ge=-1, le=65_535)
    """The CPU that the first process of an app instance stays on, the next one on the next, from 0 on and round; -1:
    they go where the system puts them. None is 0 for `./run`, which gives each instance its own, else -1."""

    edge_workers: int = Field(2, ge=1, le=64)
    """Worker processes of one edge."""

    database_timeout: float = Field(1.0, ge=0.1, le=60)
    """Seconds that one request may spend on PostgreSQL, waiting for a connection included; then 503."""

    redis_timeout: float = Field(0.1, ge=0.01, le=5)
    """Seconds to connect to Redis or to wait for its answer; then the request goes on without it."""

    redis_direct: bool = False
    """Whether REDIS_URL is Redis' own socket on this machine, with no forwarder between: then a refused connection
    shows that it is dead, and a write need not wait until nobody uses it any more."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(ServiceSettings):
    """What the app needs to know."""

    database_url: Annotated[str, AfterValidator(_postgres_dsn)]
    redis_url: Annotated[str, AfterValidator(_redis_url)]


class StackSettings(BaseSettings):
    """What `./run up` needs to know besides; its options of the same names win over these.

    With `database_url` or `redis_url` set, those servers are used and none of our own are started.
    """

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    port: int | None = Field(None, ge=1, le=65_535)
    bind: str = "127.0.0.1"
    edges: int = Field(1, ge=1, le=16)
    apps: int = Field(2, ge=1, le=16)
    data: Path | None = None
    database_url: Annotated[str, AfterValidator(_postgres_dsn)] | None = None
    redis_url: Annotated[str, AfterValidator(_redis_url)] | None = None


S = TypeVar("S", bound=BaseSettings)


def load(kind: type[S] = Settings, env_file: Path | None = Path(".env"), **given: Any) -> S:  # type: ignore[assignment]
    """Read settings of this kind; `given` values win over every source.

    Raises:
        BadSetting: with one sentence for each bad value.
    """
    secrets = Path(os.environ.get("SECRETS_DIR") or SECRETS)
    try:
        return kind(_env_file=env_file, _secrets_dir=secrets if secrets.is_dir() else None, **given)
    except ValidationError as error:
        raise BadSetting("\n".join(_sentence(kind, problem) for problem in error.errors())) from None


def _sentence(kind: type[BaseSettings], problem: Any) -> str:
    field = str(problem["loc"][0])
    key = field.upper()
    if problem["type"] == "missing":
        return f"{key} is not set. Set it in the environment, in .env or as a file in /run/secrets."
    shown = repr(problem["input"])
    if key.endswith("_URL"):  # may hold a password
        shown = "(not shown)"
    return f"{key}={shown} is not allowed: it must be {_allowed(kind, field, problem)}."


def _allowed(kind: type[BaseSettings], field: str, problem: Any) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "literal_error":
        return f"one of {problem['ctx']['expected']}"
    information = kind.model_fields[field]
    bounds = {type(rule).__name__: rule for rule in information.metadata}
    number = "a number" if information.annotation is float else "a whole number"
    if "Ge" in bounds and "Le" in bounds:
        return f"{number} from {bounds['Ge'].ge} to {bounds['Le'].le}"
    return str(problem["msg"])
