"""Migrate the schema: Alembic, with the app's own settings and under an advisory lock.

A migration runs while the apps of the version before serve. So it names the oldest code that works with the tables that
it leaves (`usable_from`), and it gives up a lock that it does not get at once: a statement that waits for a table makes
all others wait behind it. docs/upgrading.md shows how to write a migration.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Connection as SqlConnection
from sqlalchemy import Engine, create_engine, exc, pool, text

from velikiy.postgres import CONNECT_OPTIONS, MIGRATION_LOCK, patient

MIGRATIONS = Path(__file__).parent.parent.parent / "migrations"

LOCK_POLL_S = 0.2
"""Seconds between two attempts at MIGRATION_LOCK. A statement that waited for it would have a snapshot, for whose end
CREATE INDEX CONCURRENTLY waits: each would wait for the other."""

IDLE_S = 10
"""Seconds that the migration may pause between two statements; it needs milliseconds. Then PostgreSQL ends the session,
because a process that is stopped would keep tables locked."""

LOCK_TIMEOUT_MS = 300
"""Requests can wait so long behind a statement that waits for the lock of a table."""

LOCK_PAUSE_S = 1.0
"""Seconds between two attempts, in which the requests go on."""

LOCK_WAIT_S = 60.0
"""Seconds after which a migration gives up, because another transaction keeps a table locked."""

VERSION_TABLE = "velikiy_version"
"""Not Alembic's default name: in an adopted database it may belong to another program."""

BASELINE = "0001_baseline"

BEFORE_THE_BASELINE = "0003_resources"
"""The last revision of the development versions, which had three migrations."""

OLDER = ("0001_users", "0002_caches")

OLDEST_CODE = "0008_oldest_code"
"""The revision that added the column `oldest_code` to VERSION_TABLE."""


class CannotMigrate(Exception):
    """The reason, as a sentence for the operator. Nothing was changed."""


@dataclass(frozen=True)
class Migration:
    """A migration that the database lacks."""

    revision: str
    description: str
    usable_from: str
    """The oldest revision whose code works with the tables after this migration."""

    is_safe: bool
    """The code that runs works with the tables after this migration."""


@dataclass(frozen=True)
class State:
    """The row of VERSION_TABLE."""

    revision: str | None
    oldest_code: str | None
    """The oldest revision whose code works with the tables. None before the migration that added it."""


EMPTY = State(None, None)


class Code:
    """The migrations of a version of the code, the oldest first."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CannotMigrate: A migration cannot be loaded.
        """
        self.config = Config()
        self.config.set_main_option("script_location", str(folder).replace("%", "%%"))
        try:
            self.scripts: list[Script] = [*ScriptDirectory.from_config(self.config).walk_revisions()][::-1]
            self.revisions = [script.revision for script in self.scripts]
            self.usable_from = [self._usable_from(script) for script in self.scripts]
        except Exception as error:  # a migration is a program, which may contain any mistake
            raise CannotMigrate(f"the migrations in {folder} cannot be loaded: {_described(error)}") from None

    def _usable_from(self, script: Script) -> str:
        """Raises: ValueError"""
        usable_from = getattr(script.module, "usable_from", script.revision)
        if usable_from not in self.revisions[: self.revisions.index(script.revision) + 1]:
            raise ValueError(f"usable_from={usable_from!r} of {script.revision} names no revision before it")
        return str(usable_from)

    def knows(self, revision: str | None) -> bool:
        return revision is None or revision in (*self.revisions, *OLDER, BEFORE_THE_BASELINE)

    def can_use(self, state: State) -> bool:
        """Return whether this code knows the tables, or a newer version left them so that this code works with them."""
        return self.knows(state.revision) or (state.oldest_code is not None and self.knows(state.oldest_code))

    def lacking(self, state: State, to: str | None = None) -> list[Script]:
        """Return the migrations that the database lacks, up to a revision."""
        if not self.knows(state.revision):
            return []
        applied = self.revisions.index(state.revision) + 1 if state.revision in self.revisions else 0
        return self.scripts[applied : self.revisions.index(to) + 1 if to else None]

    def is_safe(self, script: Script, running: str | None) -> bool:
        """Return whether code of the revision `running` works with the tables after this migration. None: no code
        runs."""
        oldest = self.usable_from[self.revisions.index(script.revision)]
        return running is None or (
            running in self.revisions and self.revisions.index(oldest) <= self.revisions.index(running)
        )

    def oldest_code(self, newest: Script) -> str:
        """Return the oldest revision whose code works with the tables after the migrations up to `newest`."""
        applied = self.usable_from[: self.revisions.index(newest.revision) + 1]
        return max(applied, key=self.revisions.index)


def upgrade(
    dsn: str, *, wait: float, app_role: str | None = None, lock_wait: float = LOCK_WAIT_S, to: str | None = None
) -> list[str]:
    """Apply every missing migration. Return their revisions.

    Migrations in a row share one transaction: all of them are applied, or none. A migration with `in_transaction =
    False` stands alone, and those before it stay.

    Args:
        dsn: The address of the database, with the role that owns the tables.
        wait: Seconds to wait for PostgreSQL.
        app_role: The role of the apps, which gets the rights on the tables that it lacks. None if it is the same role.
        lock_wait: Seconds to try again while other transactions keep tables locked, or while apps run that do not suit
            the new tables.
        to: The revision to stop at; None for the newest.

    Raises:
        CannotMigrate
    """
    code = Code(MIGRATIONS)
    connection = _connect(dsn, wait)
    _check_database(connection)
    engine = create_engine("postgresql+psycopg://", creator=lambda: connection, poolclass=pool.StaticPool)
    role = app_role if app_role and app_role != connection.info.user else None
    try:
        with _alone(connection):
            if role:
                _check_role(connection, role)
            state = _state(connection)
            if not code.can_use(state):
                raise CannotMigrate(_newer(state))
            if not code.knows(state.revision):
                return []
            lacking = code.lacking(state, to)
            carried_over = state.revision in (*OLDER, BEFORE_THE_BASELINE)
            if carried_over:
                lacking.remove(code.scripts[0])
            _await_end_of_apps(connection, code, lacking, state, lock_wait)
            for in_transaction, group in groupby(lacking, _is_in_transaction):
                scripts = list(group)
                carry_over = str(state.revision) if carried_over and scripts[0] == lacking[0] else None
                step = partial(_apply, engine, code, scripts, in_transaction, carry_over, role)
                _retried(connection, lock_wait, step)
            _retried(connection, lock_wait, lambda: _heal(engine))
            if role and not lacking:
                _retried(connection, lock_wait, lambda: _grant_alone(engine, role))
            applied = [BASELINE] if carried_over else []
            applied += [script.revision for script in lacking]
            return applied
    except exc.DBAPIError as error:
        raise CannotMigrate(f"PostgreSQL refused: {_first_line(error.orig)}{_next_step(error)}") from error
    except psycopg.Error as error:
        raise CannotMigrate(f"PostgreSQL refused: {_first_line(error)}") from error
    finally:
        engine.dispose()
        connection.close()


@contextmanager
def _alone(connection: psycopg.Connection) -> Iterator[None]:
    """Keep other migrations away. The lock ends with the session."""
    connection.rollback()
    connection.autocommit = True
    connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_S}s'")
    connection.execute(f"SET idle_session_timeout = '{IDLE_S}s'")
    while connection.execute(f"SELECT pg_try_advisory_lock({MIGRATION_LOCK})").fetchone() != (True,):
        time.sleep(LOCK_POLL_S)
    connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_MS}ms'")
    connection.autocommit = False
    yield


APPS = """
SELECT DISTINCT coalesce(host(client_addr), 'this machine') FROM pg_stat_activity
WHERE datname = current_database() AND application_name IN ('velikiy reads', 'velikiy writes', 'velikiy reserved')
ORDER BY 1
"""


def _await_end_of_apps(
    connection: psycopg.Connection, code: Code, lacking: list[Script], state: State, within: float
) -> None:
    """Wait until no app and no relay is connected, if one of the migrations does not suit older code. `./run up` has
    stopped them; other orchestrators start the migration beside them.

    Raises:
        CannotMigrate: They still run.
    """
    unsafe = [script.revision for script in lacking if not code.is_safe(script, state.revision)]
    deadline = time.monotonic() + within
    while unsafe and (apps := [str(host) for (host,) in connection.execute(APPS).fetchall()]):
        connection.rollback()
        if time.monotonic() > deadline:
            which = f"migrations {' and '.join(unsafe)} do" if len(unsafe) > 1 else f"migration {unsafe[0]} does"
            raise CannotMigrate(
                f"the {which} not suit apps and relays of an older version, and some are"
                f" connected from {', '.join(apps)}. Stop them, such as by scaling them to 0, and start the migration"
                " again; nothing was changed"
            )
        time.sleep(LOCK_POLL_S)
    connection.rollback()


def _apply(
    engine: Engine,
    code: Code,
    scripts: list[Script],
    in_transaction: bool,
    carry_over: str | None,
    app_role: str | None,
) -> None:
    """
    Args:
        engine: The connection.
        code: The migrations of this code.
        scripts: The migrations to apply.
        in_transaction: Apply all of them or none.
        carry_over: The revision of a development version, which becomes the baseline first.
        app_role: The role that gets its rights.

    Raises:
        exc.DBAPIError
        CannotMigrate
    """
    with engine.connect() as connection:
        if not in_transaction:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        code.config.attributes["connection"] = connection
        try:
            with connection.begin():
                if carry_over:
                    _carry_over(connection, carry_over)
                command.upgrade(code.config, scripts[-1].revision)
                _finish(connection, code, scripts[-1], app_role)
        except (exc.DBAPIError, CannotMigrate):
            raise
        except Exception as error:
            names = " or ".join(script.revision for script in scripts)
            undone = "It was undone" if in_transaction else "Its finished steps stay, and the next attempt repeats it"
            raise CannotMigrate(f"the migration {names} failed: {_described(error)}. {undone}") from error


def _is_in_transaction(script: Script) -> bool:
    return bool(getattr(script.module, "in_transaction", True))


def _finish(transaction: SqlConnection, code: Code, newest: Script, app_role: str | None) -> None:
    """Note which code works with the tables, and give the apps their rights."""
    if OLDEST_CODE in code.revisions[: code.revisions.index(newest.revision) + 1]:
        oldest = code.oldest_code(newest)
        update = f"UPDATE {VERSION_TABLE} SET oldest_code = :oldest"  # noqa: S608
        transaction.execute(text(update), {"oldest": oldest})
    if app_role:
        _grant(transaction, app_role)


def _heal(engine: Engine) -> None:
    """Create the table of the caches again if a restore has left it out. Its rows come back by themselves."""
    with engine.begin() as transaction:
        if transaction.execute(text("SELECT to_regclass('caches') IS NULL")).scalar():
            transaction.execute(text(statements("caches")))


def _grant_alone(engine: Engine, app_role: str) -> None:
    with engine.begin() as transaction:
        _grant(transaction, app_role)


def _retried(connection: psycopg.Connection, within: float, step: Callable[[], None]) -> None:
    """Repeat the step while other transactions keep it from its locks.

    Raises:
        CannotMigrate: They have kept it for too long.
        exc.DBAPIError
    """
    deadline = time.monotonic() + within
    while True:
        try:
            return step()
        except exc.DBAPIError as error:
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected):
                raise
            if time.monotonic() > deadline:
                raise CannotMigrate(_locked(connection, within)) from None
        time.sleep(LOCK_PAUSE_S)


BLOCKERS = """
SELECT format('process %s (%s of %s, %s since %s s)', pid, coalesce(nullif(application_name, ''), 'a program'), usename,
    state, extract(epoch FROM now() - xact_start)::int)
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start < now() - interval '1 s'
ORDER BY xact_start LIMIT 3
"""


def _locked(connection: psycopg.Connection, within: float) -> str:
    blockers = [str(row[0]) for row in connection.execute(BLOCKERS).fetchall()]
    connection.rollback()
    return (
        f"another transaction kept a table locked for {within:g} s. The longest transactions: "
        f"{'; '.join(blockers) or 'none any more'}. Wait until they end, or end one: "
        "./run psql -c 'SELECT pg_terminate_backend(PROCESS)'. Then start again; this migration was undone"
    )


def check(dsn: str, migrations: Path | None = None) -> None:
    """Check that code with these migrations works with the tables of the database, if the database can be reached.

    Raises:
        CannotMigrate: A newer version of the code has migrated the database.
    """
    code = Code(migrations or MIGRATIONS)
    try:
        state = _state_at(dsn)
    except psycopg.Error:  # the server is away
        return
    if not code.can_use(state):
        raise CannotMigrate(_newer(state))


def _newer(state: State) -> str:
    since = f" and works with code since {state.oldest_code}" if state.oldest_code else ""
    return (
        f"this code is older than the database, which has the revision {state.revision}{since}: use the version of the"
        " code that migrated it, or a newer version"
    )


def pending(dsn: str, *, wait: float = 0, running: str | None = None) -> list[Migration]:
    """Return the migrations that the database lacks, the oldest first.

    Args:
        dsn: The address of the database.
        wait: Seconds to wait for PostgreSQL.
        running: The newest revision of the code that runs; None for that of the database.

    Raises:
        CannotMigrate: PostgreSQL does not answer, or this code is too old for the database.
    """
    code = Code(MIGRATIONS)
    with _connect(dsn, wait) as connection:
        state = _state(connection)
    if not code.can_use(state):
        raise CannotMigrate(_newer(state))
    runs = running or state.revision
    return [
        Migration(
            script.revision,
            " ".join((script.doc or "").split()),
            code.usable_from[code.revisions.index(script.revision)],
            code.is_safe(script, runs),
        )
        for script in code.lacking(state)
    ]


def newest_revision() -> str:
    """Return the newest revision of this code."""
    return Code(MIGRATIONS).revisions[-1]


def state(dsn: str) -> tuple[str, str]:
    """Return the revision of the database, and the newest of this code.

    Raises:
        CannotMigrate: This code is too old for the database.
    """
    code = Code(MIGRATIONS)
    try:
        state = _state_at(dsn)
    except psycopg.Error:  # the server is away
        state = EMPTY
    if not code.can_use(state):
        raise CannotMigrate(_newer(state))
    return state.revision or "(none)", code.revisions[-1]


def age(revision: str) -> Literal["newest", "older", "unknown"]:
    """Return how this revision compares with the revisions of this code. A newer version has unknown revisions."""
    *older, newest = Code(MIGRATIONS).revisions
    return "newest" if revision == newest else "older" if revision in older else "unknown"


def await_migration(dsn: str, *, wait: float) -> None:
    """Wait until another process has applied every migration of this code. A newer database is fine if this code works
    with it.

    Raises:
        CannotMigrate: The time is over, or this code is too old for the database.
    """
    code = Code(MIGRATIONS)
    deadline = time.monotonic() + wait
    while True:
        try:
            state = _state_at(dsn)
            if not code.can_use(state):
                raise CannotMigrate(_newer(state))
            if state.revision and not code.lacking(state):
                return
            present = f"the database has the revision {state.revision}" if state.revision else "there are no tables yet"
            awaited = f"{present}, and the revision {code.revisions[-1]} is awaited"
        except psycopg.Error as error:
            awaited = f"PostgreSQL refused: {_first_line(error)}"
        if time.monotonic() > deadline:
            raise CannotMigrate(f"no migration within {wait:g} s: {awaited}")
        time.sleep(0.5)


def _state_at(dsn: str) -> State:
    """Raises: psycopg.Error"""
    with psycopg.connect(patient(dsn), **CONNECT_OPTIONS, application_name="velikiy migrate") as connection:
        return _state(connection)


def _state(connection: psycopg.Connection) -> State:
    """Return the row of the table, which may lack a column.

    Raises:
        psycopg.Error
    """
    row = None
    # An attempt to read a table that is missing would be the first error in the log of each new database.
    if connection.execute("SELECT to_regclass(%s)", (VERSION_TABLE,)).fetchone() != (None,):
        row = connection.execute(f"SELECT to_jsonb(version) FROM {VERSION_TABLE} version").fetchone()  # noqa: S608
    connection.rollback()
    return State(row[0].get("version_num"), row[0].get("oldest_code")) if row else EMPTY


def role_of(dsn: str | None) -> str | None:
    """Return the role that an address names."""
    role = conninfo_to_dict(dsn).get("user") if dsn else None
    return str(role) if role else None


def _check_role(connection: psycopg.Connection, app_role: str) -> None:
    """
    Raises:
        CannotMigrate: The role does not exist.
    """
    row = connection.execute("SELECT to_regrole(quote_ident(%s)) IS NOT NULL", (app_role,)).fetchone()
    if row != (True,):
        raise CannotMigrate(
            f"PostgreSQL has no role {app_role}. Create it: CREATE ROLE {app_role} LOGIN PASSWORD '...'"
        )
    connection.rollback()


def _grant(transaction: SqlConnection, app_role: str) -> None:
    """Grant the rights that the apps' role lacks."""
    transaction.execute(text("SELECT set_config('velikiy.app_role', :role, true)"), {"role": app_role})
    transaction.execute(text(statements("grants")))


def _next_step(error: exc.DBAPIError) -> str:
    """Return the next step if the role lacks a right, else an empty string."""
    if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
        return ""
    return ". Set MIGRATION_DATABASE_URL to the address with the role that owns the tables"


def statements(name: str) -> str:
    """Return the SQL of a file in migrations/sql."""
    return (MIGRATIONS / "sql" / f"{name}.sql").read_text()


def _carry_over(transaction: SqlConnection, revision: str) -> None:
    """Turn the schema of the development versions into the baseline.

    Raises:
        CannotMigrate
    """
    if revision in OLDER:
        raise CannotMigrate(
            f"the database has the revision {revision} of an early development version, which this version cannot "
            "migrate. Save the rows with psql (COPY users TO STDOUT CSV HEADER), start with a new database, and import "
            "the file with velikiy users import; nothing was changed."
        )
    for name in ("carry_over", "resources", "add_triggers", "carry_over_triggers"):
        transaction.execute(text(statements(name)))
    transaction.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = :new"), {"new": BASELINE})  # noqa: S608


def _connect(dsn: str, wait: float) -> psycopg.Connection:
    until = time.monotonic() + wait
    while True:
        try:
            return psycopg.connect(patient(dsn), **CONNECT_OPTIONS, application_name="velikiy migrate")
        except psycopg.OperationalError as error:
            if time.monotonic() >= until:
                raise CannotMigrate(
                    f"PostgreSQL accepted no connection within {wait:g} s. The last error: {_first_line(error)}. "
                    "Check DATABASE_URL and that the server runs."
                ) from None
            time.sleep(0.05)


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__


def _described(error: Exception) -> str:
    place = f" in {Path(error.filename or '').name}, line {error.lineno}" if isinstance(error, SyntaxError) else ""
    reason = error.msg if isinstance(error, SyntaxError) else _first_line(error)
    return f"{type(error).__name__}{place}: {reason}"


def _check_database(connection: psycopg.Connection) -> None:
    """Refuse a database that cannot compare texts as the API promises, before anything is created in it.

    Raises:
        CannotMigrate
    """
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise CannotMigrate(
            f"the database has the encoding {encoding}; create it with ENCODING 'UTF8' TEMPLATE template0."
        )
    row = connection.execute("SELECT lower('ГЛЕБ') = 'глеб'").fetchone()
    if not (row and row[0]):
        raise CannotMigrate(
            "the database has a locale that knows only ASCII letters, so 'ГЛЕБ' and 'глеб' would be different names; "
            "create it with LC_CTYPE 'C.UTF-8' TEMPLATE template0."
        )
