"""Define every setting of the service with its type. A setting is read once, and a bad value is refused by name.

The first source that has a value wins: the environment, `.env` in the working directory (under `./run`: in the
checkout), files in the secrets folder (`database_url`, `migration_database_url`, `redis_url`, `edge_secret`;
/run/secrets in containers). An empty value counts as not set. `.env.example` documents each setting with its unit,
default and effect; a test keeps it in step with this module.
"""

import os
import re
import shlex
from io import StringIO
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

SECRETS = Path("/run/secrets")

PATH_PREFIX = "(/[A-Za-z0-9_~-][A-Za-z0-9._~-]{0,63}){1,10}"
"""The form of a path prefix. It cannot be "//host", which would be another site, and needs no escaping anywhere."""


DEFAULT_IDEMPOTENCY_QUOTA = 100_000
"""More than a request a second over 24 hours, and some 50 MB in PostgreSQL."""


class BadSetting(Exception):
    """A setting that cannot be used. The text names the key, the value and the allowed values."""


def _postgres_dsn(value: str) -> str:
    # Imports inside the functions: the launcher starts twice for each command and mostly has no address to check.
    # psycopg and redis would delay it by 0.2 s.
    import psycopg.conninfo

    try:
        psycopg.conninfo.conninfo_to_dict(value)
    except psycopg.Error:
        raise ValueError("a PostgreSQL address such as postgresql://user:password@host:5432/database") from None
    return value


def _redis_url(value: str) -> str:
    import redis

    from velikiy.redis_address import RedisAddress

    try:
        address = RedisAddress.parse(value)
        fits = all(map(_is_redis_url, (*address.urls, *([address.of("host:1")] if address.primary else []))))
    except (ValueError, TypeError, redis.exceptions.RedisError):
        fits = False
    if not fits:
        raise ValueError(
            "a Redis address such as redis://:password@host:6379/0, redis://host,host2/0 or"
            " redis+sentinel://host,host2/primary"
        )
    return value


def _is_redis_url(value: str) -> bool:
    """Raises: ValueError, TypeError, redis.exceptions.RedisError"""
    import redis

    # redis-py refuses unknown options only when it creates a connection, which does not connect yet.
    pool = redis.ConnectionPool.from_url(value)
    pool.make_connection()
    number = "" if value.startswith("unix:") else urlsplit(value).path.strip("/")
    return (number.isdigit() or not number) and not pool.connection_kwargs.get("decode_responses")


HOST = r"(?:[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?|\[[0-9a-f:.]+\]"
"""A name, an IPv4 address or an IPv6 address in brackets, in lower case."""

ORIGIN = rf"[a-z][a-z0-9+.-]*://(?:{HOST})(?::[1-9][0-9]{{0,4}})?"
DEFAULT_PORT = r"http://.*\]?:80|https://.*\]?:443"


def _hosts(value: str) -> str:
    names = _members(value.lower())
    if not all(re.fullmatch(rf"\*|\.?(?:{HOST})", name) for name in names):
        raise ValueError(
            "names separated by commas, without a port: users.example, or .users.example for a name and all names below"
            " it, or * for every name"
        )
    return ",".join(names)


def _origins(value: str) -> str:
    origins = _members(value)
    # Browsers send no default port, so such an origin would never match.
    if not all(re.fullmatch(ORIGIN, origin) and not re.fullmatch(DEFAULT_PORT, origin) for origin in origins):
        raise ValueError(
            "origins separated by commas, as browsers send them: https://app.example or http://localhost:3000, in lower"
            " case, without a path, a slash at the end or a default port; * is refused, because it would let every web"
            " page write"
        )
    return ",".join(origins)


def _members(value: str) -> list[str]:
    return [member for member in re.split(r"[,\s]+", value) if member]


def _path_prefix(value: str) -> str:
    value = value.removesuffix("/")
    if value and not re.fullmatch(PATH_PREFIX, value):
        raise ValueError("a path such as /api, of letters, digits and -._~")
    return value


def _collector(value: str) -> str:
    value = value.removesuffix("/").lower()
    if value and not re.fullmatch(rf"http://(?:{HOST})(?::[1-9][0-9]{{0,4}})?", value):
        raise ValueError("the address of a collector, such as http://127.0.0.1:4318")
    return value


def _networks(value: str) -> str:
    try:
        return ",".join(str(ip_network(network, strict=False)) for network in re.split("[, ]+", value) if network)
    except ValueError:
        raise ValueError("a list of addresses and networks such as 127.0.0.1,10.0.0.0/8") from None


def is_loopback(address: str) -> bool:
    """Return whether only programs on this machine reach this address."""
    try:
        return address == "localhost" or ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False


def auth_mode(auth: str | None, listens_on: str) -> str:
    """Return the requests that need an API key: `off`, `writes` or `all`.

    Args:
        auth: The setting AUTH.
        listens_on: The address where clients reach the service.

    Raises:
        BadSetting: Other machines reach the service, and AUTH is not set.
    """
    if auth is None and not is_loopback(listens_on):
        raise BadSetting(
            f"BIND={listens_on} lets other machines reach the service, so AUTH must be set: writes (writes need an API"
            " key), all (every request needs a key) or off (every client may read and change every row)."
        )
    return auth or "off"


def _edge_secret(value: str) -> str:
    if not re.fullmatch("[!-~]{16,}", value):
        raise ValueError("at least 16 characters of ASCII without spaces, such as the output of openssl rand -hex 24")
    return value


class TypedByPeople(BaseSettings):
    """Settings as people write them: words in any case, with blanks around them. The name of an environment variable is
    the name of the field in capitals."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True,
        env_file_encoding="utf-8-sig",  # without the byte order mark of Windows
        extra="ignore",
        frozen=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _without_case_and_blanks(cls, value: Any, information: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        field = cls.model_fields[information.field_name or ""]
        return value.strip().lower() if _words(field.annotation) else value.strip()


def _words(annotation: Any) -> tuple[str, ...]:
    """Return the words that a setting of this type may be, or nothing if it is of another type."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((words for part in get_args(annotation) if (words := _words(part))), ())


class ServiceSettings(TypedByPeople):
    """The settings of the services without the addresses of servers."""

    allowed_hosts: Annotated[str, AfterValidator(_hosts)] = ""
    """Names that clients may send in `Host`, besides localhost and the addresses that the service listens on. While the
    service listens on a loopback address only, all other names are refused; on other addresses only if this is set."""

    cors_origins: Annotated[str, AfterValidator(_origins)] = ""
    """Origins whose web pages may read and write from a browser."""

    auth: Literal["off", "writes", "all"] | None = None
    """Requests that need an API key. None means off while only this machine reaches the service, and is refused
    otherwise (`auth_mode`)."""

    redis_ttl: int = Field(60, ge=1, le=86_400)
    """Seconds that an entry lives in Redis, counted from its first fill."""

    edge_ttl: int = Field(5, ge=1, le=3_600)
    """Seconds that Nginx serves a stored response without contacting the app."""

    edge_memory: int = Field(128, ge=4, le=65_536)
    """Megabytes of memory of one edge for stored responses."""

    app_workers: int = Field(2, ge=1, le=64)
    """Processes of one app instance."""

    app_threads: int = Field(8, ge=1, le=256)
    """Threads of each process: the number of requests that can wait for PostgreSQL or Redis at the same time."""

    app_first_cpu: int | None = Field(None, ge=-1, le=65_535)
    """The CPU of the first process of an app instance. The next process uses the next CPU, and after the last CPU comes
    the first. -1 leaves the placement to the system. None means 0 under `./run`, which gives each instance its own
    CPUs, else -1."""

    app_worker_class: Literal["epoll", "gthread"] = "epoll"
    """The gunicorn worker of the app: `velikiy/server/epoll_worker.py`, or gunicorn's own threads."""

    edge_workers: int = Field(2, ge=1, le=64)
    """Worker processes of one edge."""

    database_timeout: float = Field(1.0, ge=0.1, le=60)
    """Seconds that a request may spend on PostgreSQL, including the wait for a connection. Then the response is 503."""

    redis_timeout: float = Field(0.1, ge=0.01, le=5)
    """Seconds to connect to Redis or to wait for its response. Then the request continues without Redis."""

    redis_direct: bool = False
    """True if REDIS_URL is a Unix socket or an IP address of this machine at which Redis itself listens, without a
    forwarder in between. Then it is certain when Redis is down, and a write does not wait until no process uses it."""

    path_prefix: Annotated[str, AfterValidator(_path_prefix)] = ""
    """The path that a proxy in front of the edges removes from each address. The service's own addresses in responses
    begin with it."""

    tls_cert: Path | None = None
    """The file with the certificate of the edges and its chain, in PEM. With it, clients reach the service by https."""

    tls_key: Path | None = None
    """The file with the private key of the certificate, in PEM."""

    tls_hsts: int = Field(31_536_000, ge=0, le=99_999_999)
    """Seconds that browsers shall reach this host by https only (Strict-Transport-Security). 0 sends no such header.
    A certificate that signs itself never gets one."""

    trusted_proxies: Annotated[str, AfterValidator(_networks)] = ""
    """The addresses and networks of the proxies whose `X-Forwarded-*` headers count (edge/conf/proxies.conf)."""

    rate_requests: int | None = Field(None, ge=0, le=99_999)
    """Requests that one client may send in `rate_window` seconds, 0 for no limit. None means 0 while the service
    listens on a loopback address only, else 500 (edge/start)."""

    rate_window: int = Field(1, ge=1, le=3_600)

    rate_connections: int | None = Field(None, ge=0, le=99_999)
    """Connections of one client with a request in progress, 0 for no limit. None means 0 while the service listens on a
    loopback address only, else 100. Hits do not count."""

    idempotency_quota: int | None = Field(None, ge=0, le=1_000_000)
    """Idempotency keys of one owner within 24 hours, 0 for no limit. None means 0 while the service listens on a
    loopback address only, else 100,000."""

    history_days: int = Field(365, ge=0, le=36_500)
    """Days after which the history of a row forgets a version that was replaced or deleted. 0 keeps all of them."""

    max_edges: int = Field(64, ge=1, le=1024)
    """Edges that may be registered at the same time. Each costs each write a request."""

    metrics: Literal["on", "off"] = "on"
    """With "on", all processes count for Prometheus (docs/monitoring.md)."""

    traces_url: Annotated[str, AfterValidator(_collector)] = ""
    """The collector that receives traces by OpenTelemetry's protocol over HTTP (docs/traces.md). Empty: no traces."""

    traces_ratio: float = Field(0.01, ge=0, le=1)
    """Share of the requests that the edges trace."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The lowest level that all parts of the stack log."""


class Settings(ServiceSettings):
    """The settings of the app and of the relay."""

    bind: str = "127.0.0.1"
    """The address where clients reach the service. An app that is started by itself takes its own, APP_LISTEN."""

    database_url: Annotated[str, AfterValidator(_postgres_dsn)]
    redis_url: Annotated[str, AfterValidator(_redis_url)]

    database_direct_url: Annotated[str, AfterValidator(_postgres_dsn)] | None = None
    """The address of PostgreSQL itself, if `database_url` leads to PgBouncer in transaction mode. Only apps use the
    pooler: notifications, migrations and commands need sessions of their own."""

    edge_secret: Annotated[str, AfterValidator(_edge_secret)]
    """Apps, relay and edges of one database sign their requests to each other with it."""

    @property
    def direct_url(self) -> str:
        """The address for what needs a session of its own."""
        return self.database_direct_url or self.database_url

    @property
    def listens_on(self) -> str:
        """The address where clients reach the service: decides which names they may send in `Host`."""
        listen = os.environ.get("APP_LISTEN")
        return listen.rpartition(":")[0] if listen and "bind" not in self.model_fields_set else self.bind

    @property
    def auth_mode(self) -> str:
        """Raises: BadSetting"""
        return auth_mode(self.auth, self.listens_on)

    @property
    def quota_of_idempotency_keys(self) -> int:
        """The setting `idempotency_quota` with its default."""
        if self.idempotency_quota is None:
            return 0 if is_loopback(self.listens_on) else DEFAULT_IDEMPOTENCY_QUOTA
        return self.idempotency_quota


class FolderSettings(TypedByPeople):
    """The setting of every command of `./run`. A bad value of another setting keeps no command from its stack."""

    data: Path | None = None


class StackSettings(FolderSettings):
    """The further settings of `./run up`. Its options of the same names win over them.

    If `database_url` or `redis_url` is set, the stack uses that server and starts none of its own.
    """

    port: int | None = Field(None, ge=1, le=65_535)
    http_port: int | None = Field(None, ge=0, le=65_535)
    """The port where the first edge redirects plain HTTP to TLS. 0 opens none. None means 80 if `port` is 443 and port
    80 can be opened."""

    metrics_port: int | None = Field(None, ge=1, le=65_535)
    """The port on 127.0.0.1 where Prometheus reads the metrics of the whole stack. None means a free port, which
    `./run status` names."""

    prometheus_port: int = Field(9090, ge=1, le=65_535)
    """The port on 127.0.0.1 of the Prometheus that `--monitoring` starts."""

    log_file_size: int = Field(10, ge=1, le=100_000)
    """Megabytes after which a new file of a log is begun."""

    log_files: int = Field(4, ge=1, le=1_000)
    """Files that are kept of each log, with the one that is being written."""

    redis_memory: int = Field(256, ge=4, le=65_536)
    """Megabytes of memory of the stack's own Redis for entries."""

    wal_archive: Path | None = None
    """The folder where the stack's own PostgreSQL archives its log of changes, for recovery to a point in time."""

    bind: str = "127.0.0.1"
    edges: int = Field(1, ge=1, le=16)
    apps: int = Field(2, ge=1, le=16)
    database_url: Annotated[str, AfterValidator(_postgres_dsn)] | None = None
    migration_database_url: Annotated[str, AfterValidator(_postgres_dsn)] | None = None
    """The database of `database_url`, with the role that owns the tables. None means that `database_url` names it."""

    database_direct_url: Annotated[str, AfterValidator(_postgres_dsn)] | None = None
    redis_url: Annotated[str, AfterValidator(_redis_url)] | None = None
    edge_secret: Annotated[str, AfterValidator(_edge_secret)] | None = None


class MigrationSettings(TypedByPeople):
    """The settings of `velikiy migrate`. The container that runs it has the last address only.

    All come from the same source: `DATABASE_URL` in the environment may name another database than the files of a
    stack.
    """

    database_url: Annotated[str, AfterValidator(_postgres_dsn)] | None = None
    database_direct_url: Annotated[str, AfterValidator(_postgres_dsn)] | None = None
    migration_database_url: Annotated[str, AfterValidator(_postgres_dsn)] | None = None

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        *earlier, secrets = (*sources, *named.values())
        return (next((source for source in earlier if cls.model_fields.keys() & source().keys()), secrets),)


S = TypeVar("S", bound=BaseSettings)

ENV_FILE = Path(".env")


def load(kind: type[S] = Settings, env_file: Path | None = ENV_FILE, **given: Any) -> S:  # type: ignore[assignment]
    """Return the settings of this kind.

    Args:
        kind: The class of the settings.
        env_file: The `.env` file, or None to read no such file.
        given: Values that win over every source.

    Raises:
        BadSetting: At least one value is bad, or a file with settings cannot be read. The text has a sentence for each.
    """
    if env_file == ENV_FILE and "VELIKIY_CACHE" in os.environ:
        # `./run` has read the file of the checkout. The working folder of its user may belong to another project.
        env_file = None
    if env_file:
        read_env_file(env_file)  # refuses what the library passes over
    secrets = Path(os.environ.get("SECRETS_DIR") or SECRETS)
    try:
        return kind(_env_file=env_file, _secrets_dir=secrets if secrets.is_dir() else None, **given)
    except ValidationError as error:
        raise BadSetting("\n".join(_sentence(kind, problem) for problem in error.errors())) from None
    except (SettingsError, OSError, UnicodeDecodeError) as error:
        cause = error.__cause__ if isinstance(error, SettingsError) else error
        if isinstance(cause, OSError) and cause.filename is not None:
            raise BadSetting(_unreadable(Path(cause.filename), cause)) from None
        if isinstance(cause, UnicodeDecodeError):  # the library does not name the file
            raise BadSetting(f"A file in {secrets} is not UTF-8. Save it as UTF-8.") from None
        raise


def read_env_file(file: Path) -> dict[str, str]:
    """Return the variables in a `.env` file, or none if there is no such file.

    Raises:
        BadSetting: The file cannot be read, or a line in it is no setting.
    """
    try:
        if not file.exists():
            if file.is_symlink():
                raise BadSetting(f"{file} is a link to a file that does not exist. Create the file or remove the link.")
            return {}
        if file.is_fifo():  # reading it would wait for ever
            raise BadSetting(f"{file} is a pipe. Put a file in its place, or remove it.")
        content = file.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise BadSetting(_unreadable(file, error)) from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        old, new = shlex.quote(str(file)), shlex.quote(f"{file}.new")
        raise BadSetting(
            f"{file} is not UTF-8, in line {line}. Save it as UTF-8; if it is in windows-1251: "
            f"(umask 077; iconv -f windows-1251 -t UTF-8 -o {new} {old} && mv {new} {old})"
        ) from None
    bindings = list(parse_stream(StringIO(text)))
    if wrong := next((binding.original.line for binding in bindings if binding.error), 0):
        raise BadSetting(f"{file} has a line that is no setting: line {wrong}. Write NAME=value, or # and a comment.")
    values = {name: value or "" for name, value in dotenv_values(stream=StringIO(text)).items()}
    if damaged := next((name for name, value in values.items() if "\0" in name + value or not name), None):
        raise BadSetting(f"{file} has a value with a NUL character: {damaged!r}. Remove the character.")
    return values


def _unreadable(file: Path, error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        return f"{file} is a folder. Put a file in its place, or remove it."
    return f"{file} cannot be read: {error.strerror}. Correct its permissions, or run as its owner."


def _sentence(kind: type[BaseSettings], problem: Any) -> str:
    field = str(problem["loc"][0])
    key = field.upper()
    if problem["type"] == "missing":
        return f"{key} is not set. Set it in the environment, in .env or as a file in /run/secrets."
    shown = repr(problem["input"])
    if key.endswith(("_URL", "_SECRET")):  # may contain a password
        shown = "(not shown)"
    return f"{key}={shown} is not allowed: it must be {_allowed(kind, field, problem)}."


def _allowed(kind: type[BaseSettings], field: str, problem: Any) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "literal_error":
        return f"one of {problem['ctx']['expected']}"
    if problem["type"].startswith("bool"):
        return "true or false (or yes, no, on, off, 1, 0)"
    information = kind.model_fields[field]
    bounds = {type(rule).__name__: rule for rule in information.metadata}
    number = "a number" if information.annotation is float else "a whole number"
    if "Ge" in bounds and "Le" in bounds:
        return f"{number} from {bounds['Ge'].ge} to {bounds['Le'].le}"
    return str(problem["msg"])
