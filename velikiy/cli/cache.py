"""`velikiy cache`: show and purge the entries of a path."""

import json

import click

from velikiy import coherence
from velikiy.cli.connection import open_gate
from velikiy.command_line import CommandGroup
from velikiy.resources.base import path_of


@click.group(cls=CommandGroup)
def cache() -> None:
    """Inspect or purge the caches."""


@cache.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def show(path: str, as_json: bool) -> None:
    """Show the entries for PATH in each cache tier: /users, /users?limit=5, /users/7."""
    from velikiy.coherence import inspect

    with open_gate() as (settings, gate):
        tiers = inspect.look(gate, _cache_path(path), path, settings)
    click.echo(json.dumps(tiers, indent=2) if as_json else inspect.text(path, tiers))


@cache.command()
@click.argument("path", required=False)
@click.option("--all", "everything", is_flag=True, help="Remove every entry, in Redis and at every edge.")
def purge(path: str | None, everything: bool) -> None:
    """Remove PATH from both cache tiers. Reads are correct without a purge."""
    if (path is None) != everything:
        raise click.UsageError("give either a PATH or --all")
    with open_gate() as (_, gate), gate.database.autocommit() as connection:
        gate.drop(connection, [_cache_path(path)] if path else None)
        redis, *edges = gate.caches.all(connection)
    click.echo(f"dropped {path or 'everything'} in Redis and at {len(edges)} edge{'' if len(edges) == 1 else 's'}")
    for cache in (redis, *edges):
        if cache.fenced:
            name = f"edge {cache.address}" if cache.address else "Redis"
            click.echo(f"{name} does not answer: it is fenced and will be emptied before it is used again", err=True)


def _cache_path(address: str) -> coherence.CachePath:
    path = path_of(address)
    if path is None:
        raise click.BadParameter(
            f"'{address}' is not cached. Give /users, one of its pages, /users/count, /users/<id> or its /history"
        )
    return path
