"""`velikiy keys`: create, list, revoke and rotate API keys."""

import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from velikiy.cli.connection import open_gate
from velikiy.cli.errors import program
from velikiy.command_line import CommandGroup
from velikiy.keys import store

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

COLUMNS = ("id", "name", "scope", "state", "key", "created", "expires", "last used")


class Duration(click.ParamType[timedelta]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        if duration := _duration(value):
            return duration
        return self.fail(f"'{value}' is no duration. Write 30m, 12h, 90d or 4w", param, ctx)


class Moment(click.ParamType[datetime]):
    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        now = datetime.now(UTC)
        try:
            duration = _duration(value)
            moment = now + duration if duration else datetime.fromisoformat(value)
            moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).replace(microsecond=0)
        except (ValueError, OverflowError):
            return self.fail(f"'{value}' is no time. Write 90d, or 2027-01-31, or 2027-01-31T12:00:00Z", param, ctx)
        if moment <= now:
            return self.fail(f"'{value}' is in the past", param, ctx)
        return moment


def _duration(value: str) -> timedelta | None:
    spelled = re.fullmatch("([0-9]{1,6})([smhdw])", value)
    return timedelta(**{UNITS[spelled[2]]: int(spelled[1])}) if spelled else None


def _name(_: click.Context, __: click.Parameter, value: str) -> str:
    if not re.fullmatch(store.NAME, value):
        raise click.BadParameter("use up to 64 letters, digits and .-_, beginning with a letter, such as deploy-bot")
    return value


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
expires_option: Callable[..., Any] = click.option(
    "--expires", type=Moment(), help="A duration (90d, 12h) or a time in UTC (2027-01-31). Default: never."
)


@click.group(cls=CommandGroup)
def keys() -> None:
    """Manage the API keys of clients."""


@keys.command()
@click.argument("name", callback=_name)
@click.option("--scope", type=click.Choice(store.SCOPES), required=True, help="write includes read.")
@expires_option
@as_json_option
def create(name: str, scope: str, expires: datetime | None, as_json: bool) -> None:
    """Create the key NAME and print it. It is shown only this once."""
    with open_gate() as (_, gate):
        try:
            created = store.create(gate, name, scope, expires)
        except store.NameTaken:
            sys.exit(
                f"velikiy keys create: a key named {name} exists. Choose another name, revoke it, or replace it with"
                f" {program()} keys rotate {name}"
            )
    _print_created(created, as_json)


@keys.command("list")
@click.option("--all", "with_revoked", is_flag=True, help="Also list revoked keys.")
@as_json_option
def list_keys(with_revoked: bool, as_json: bool) -> None:
    """List the keys, without the keys themselves."""
    with open_gate() as (_, gate), gate.database.autocommit() as connection:
        rows = [_listed(row) for row in store.listed(connection, with_revoked=with_revoked)]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo(f"there are no keys; create one with {program()} keys create NAME --scope read", err=True)
        return
    table = [tuple(name.upper() for name in COLUMNS), *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@keys.command()
@click.argument("key", metavar="NAME|ID")
@as_json_option
def revoke(key: str, as_json: bool) -> None:
    """Revoke the key with this name or id. When the command returns, the key is refused everywhere."""
    with open_gate() as (_, gate):
        try:
            revoked = store.revoke(gate, key)
        except store.NoSuchKey:
            sys.exit(f"velikiy keys revoke: no valid key has the name or id {key}. See {program()} keys list")
    click.echo(json.dumps({"revoked": revoked}) if as_json else f"revoked {key}")


@keys.command()
@click.argument("name", callback=_name)
@click.option(
    "--overlap",
    type=Duration(),
    default=timedelta(0),
    help="How long the old key stays valid, such as 1h. Default: not at all.",
)
@expires_option
@as_json_option
def rotate(name: str, overlap: timedelta, expires: datetime | None, as_json: bool) -> None:
    """Replace the key NAME by a new key with the same scope, and print the new key."""
    with open_gate() as (_, gate):
        try:
            created = store.rotate(gate, name, overlap, expires)
        except store.NoSuchKey:
            sys.exit(f"velikiy keys rotate: no valid key has the name {name}. See {program()} keys list")
    _print_created(created, as_json)


def _print_created(created: store.Created, as_json: bool) -> None:
    """Print the key alone to stdout, so that a script can store it: KEY=$(velikiy keys create ...)."""
    if as_json:
        members = {"id": created.id, "name": created.name, "scope": created.scope}
        click.echo(json.dumps({**members, "expires_at": _time(created.expires_at), "key": created.token}))
        return
    click.echo(created.token)
    click.echo("Keep this key now: it is not shown again. Clients send it as Authorization: Bearer <key>", err=True)


def _listed(row: dict[str, Any]) -> dict[str, Any]:
    expired = row["expires_at"] is not None and row["expires_at"] <= datetime.now(UTC)
    state = "revoked" if row["revoked_at"] else "expired" if expired else "valid"
    times = {name: _time(row[name]) for name in ("created_at", "expires_at", "last_used_at", "revoked_at")}
    members = {name: row[name] for name in ("id", "name", "scope")}
    return {**members, "state": state, "begins_with": row["shown"], **times}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = [row["created_at"], row["expires_at"] or "never", row["last_used_at"] or "never"]
    return (str(row["id"]), row["name"], row["scope"], row["state"], f"{row['begins_with']}...", *times)


def _time(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z") if moment else None
