"""`velikiy doctor`: look at everything that the service depends on, and advise."""

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import psycopg
from pydantic_settings import BaseSettings

from velikiy import logs
from velikiy.cli.errors import command_of_run
from velikiy.coherence import RedisTier
from velikiy.coherence.redis_tier import DoesNotAnswer
from velikiy.findings import Finding, caches, configuration, machine, merged, postgres
from velikiy.postgres import CONNECT_OPTIONS, Connection, Database, lacking_settings
from velikiy.settings import BadSetting, Settings, StackSettings, load

REDIS_TIMEOUT_S = 2.0

Check = Callable[[], Iterator[Finding]]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def doctor(as_json: bool) -> None:
    """Check settings, servers, clocks, locks, rights and limits, and say what to do.

    Exits with 0 if nothing is wrong (warnings may be), else with 1.
    """
    logs.configure("error")
    results, hints = _examine()
    findings = [it.with_commands(command_of_run) for it in merged([it for found in results.values() for it in found])]
    wrong = [it for it in findings if it.wrong]
    if as_json:
        members = {"healthy": not wrong, "findings": [it.as_json() for it in findings], "hints": hints}
        click.echo(json.dumps(members, indent=2))
        sys.exit(1 if wrong else 0)
    for name, found in results.items():
        state = "WRONG  " if any(it.wrong for it in found) else "warning" if found else "ok     "
        click.echo(f"{state}  {name}")
    for it in findings:
        since = f" (since {caches.at(it.since)})" if it.since else ""
        click.echo(f"\n{'WRONG' if it.wrong else 'warning'}: {it.what}{since}\n  {it.advice}")
    for hint in hints:
        click.echo(f"\nhint: {hint}")
    warnings = len(findings) - len(wrong)
    click.echo(f"\n{_number(len(wrong), 'problem')}, {_number(warnings, 'warning')}")
    sys.exit(1 if wrong else 0)


def _number(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def _examine() -> tuple[dict[str, list[Finding]], list[str]]:
    """Return the findings of each check, and hints. Without settings, only this machine can be examined."""
    checks: dict[str, Check] = {
        "names in .env": lambda: iter(it for file in _env_files() for it in configuration.unknown_in(file)),
        "limits": lambda: iter(machine.limits()),
        "memory": lambda: iter(machine.memory()),
    }
    results: dict[str, list[Finding]] = {}
    hints: list[str] = []
    settings, results["settings"] = _settings()
    if settings:
        hints = [*configuration.hints(settings)]
        examination = Examination(settings)
        checks.update(
            {
                "secrets": examination.secrets,
                "disk": examination.disk,
                "PostgreSQL": examination.postgres,
                "locale": examination.locale,
                "migrations": examination.migrations,
                "pooler": examination.pooler,
                "sessions and locks": examination.sessions,
                "Redis": examination.redis,
                "edges": examination.edges,
                "other stacks": examination.other_stacks,
            }
        )
    for name, check in checks.items():
        results[name] = [*check()]
    return results, hints


def _settings() -> tuple[Settings | None, list[Finding]]:
    """Return the settings, or None if one of them is refused, and the findings about them."""
    # `./run` reads further settings, at each `up`.
    kinds: list[type[BaseSettings]] = [Settings, StackSettings] if "VELIKIY_CACHE" in os.environ else [Settings]
    found = configuration.all_refused(kinds)
    try:
        settings = load(Settings)
        settings.auth_mode  # noqa: B018 - raises BadSetting
    except BadSetting as bad:
        return None, found or [configuration.refused(str(bad))]
    return settings, found


def _env_files() -> set[Path]:
    """Return the files that `./run` and the commands read."""
    checkout = Path(__file__).parent.parent.parent
    # Under `./run` the working folder may be that of another project.
    folders = [checkout] if "VELIKIY_CACHE" in os.environ else [checkout, Path.cwd()]
    return {(folder / ".env").resolve() for folder in folders}


class Examination:
    """Looks at the servers of these settings. A check that needs a server that is away finds nothing."""

    def __init__(self, settings: Settings) -> None:
        from velikiy.resources.base import registry

        self.settings = settings
        self.tables = [*registry()]
        self.folder = Path(os.environ.get("SECRETS_DIR") or "/run/secrets")
        self.connection: Connection | None = None
        self.table: caches.Table | None = None
        self.tier = RedisTier(settings.redis_url, lambda: None, ttl=60, timeout=REDIS_TIMEOUT_S)

    def secrets(self) -> Iterator[Finding]:
        """Secrets that other users of this machine can read."""
        for file in [self.folder, *self.folder.rglob("*")] if self.folder.is_dir() else []:
            mode = file.lstat().st_mode
            if file == self.folder or stat.S_ISLNK(mode):
                continue
            if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP) and not _is_closed(file):
                yield configuration.open_secret(file)

    def disk(self) -> Iterator[Finding]:
        yield from machine.disk(self.folder.parent if self.folder.is_dir() else Path.cwd())

    def postgres(self) -> Iterator[Finding]:
        """The connection, and states in which writes may be lost."""
        dsn = self.settings.direct_url
        try:
            self.connection = Connection.connect(
                postgres.with_short_wait(dsn), **CONNECT_OPTIONS, autocommit=True, application_name="velikiy doctor"
            )
        except psycopg.Error:
            yield postgres.why_away(dsn)
            return
        if not postgres.is_readable(self.connection):
            yield postgres.unreadable()
            return
        yield from postgres.hazards(self.connection, self.tables)
        yield from postgres.archive(self.connection)
        believers = Database(dsn, size=1, timeout=1).believers()
        if len(believers) > 1:
            yield postgres.two_leaders(believers)
        try:
            self.table = caches.table(self.connection)
        except psycopg.ProgrammingError:
            return  # the hazards name the rights that are missing

    def locale(self) -> Iterator[Finding]:
        if self.connection:
            yield from postgres.locale(self.connection)

    def migrations(self) -> Iterator[Finding]:
        if self.connection:
            from velikiy.postgres import migrate

            try:
                revision, newest = migrate.state(self.settings.direct_url)
            except migrate.CannotMigrate as error:
                yield postgres.migration_unknown(str(error))
            else:
                if revision != newest:
                    yield postgres.migration_missing(revision, newest)

    def pooler(self) -> Iterator[Finding]:
        """The sessions of PgBouncer, if one is used."""
        if self.connection and self.settings.database_direct_url:
            try:
                with psycopg.connect(
                    self.settings.database_url, **CONNECT_OPTIONS, prepare_threshold=None
                ) as connection:
                    if lacking := lacking_settings(connection):
                        yield postgres.pooler_lacks(lacking)
            except psycopg.Error:
                yield postgres.why_away(self.settings.database_url)

    def sessions(self) -> Iterator[Finding]:
        if self.connection:
            yield from postgres.sessions(self.connection, self.tables)

    def redis(self) -> Iterator[Finding]:
        try:
            self.tier.identify()
        except DoesNotAnswer as error:
            yield caches.redis_unusable(str(error))
            return
        if self.table:
            yield from caches.redis(self.tier, self.table)

    def edges(self) -> Iterator[Finding]:
        if self.table is None:
            return
        yield from caches.edges(self.table)
        if not self.table.edges:
            yield caches.no_edges()

    def other_stacks(self) -> Iterator[Finding]:
        """Edges and relays that are not of the stack whose secrets are used."""
        if self.connection is None or self.table is None:
            return
        own = self._own_edges()
        if own is not None:
            others = [row.address for row in self.table.edges if row.address not in own]
            relays = postgres.count_relays(self.connection)
            if others or relays > 1:
                yield caches.foreign_stack(others, relays)

    def _own_edges(self) -> list[str] | None:
        """Return the control listeners of the stack that `./run` has started, or None if there is no such stack."""
        try:
            plan: dict[str, Any] = json.loads((self.folder.parent / "stack.json").read_text())
            return [f"127.0.0.1:{port}" for port in plan["control_ports"]]
        except (OSError, ValueError, KeyError):
            return None


def _is_closed(file: Path) -> bool:
    """Return whether a folder above the file keeps other users out."""
    return any(not parent.stat().st_mode & stat.S_IXOTH for parent in file.parents)
