"""The tables whose rows are cached: what shows that one was changed without its triggers."""

from collections.abc import Sequence
from typing import NamedTuple

from velikiy.postgres import Connection
from velikiy.postgres.rights import CACHED_TABLES

TABLES = """
WITH RECURSIVE own AS (
    SELECT name, to_regclass(name)::oid AS id FROM unnest(%s::text[]) name
), children AS (
    SELECT name, id FROM own UNION SELECT name, inhrelid FROM children JOIN pg_inherits ON inhparent = id
), parents AS (
    SELECT name, id FROM own UNION SELECT name, inhparent FROM parents JOIN pg_inherits ON inhrelid = id
), tables AS (
    SELECT name, id FROM children UNION SELECT name, id FROM parents
)
SELECT
    name,
    string_agg(concat_ws(' ', id, relfilenode, pg_class.xmin, columns, triggers), ', ' ORDER BY id),
    array_agg(id::regclass::text) FILTER (WHERE pg_class.oid IS NOT NULL AND EXISTS (
        SELECT FROM (VALUES
            ('rows_notify', 60, false), ('row_changed', 16, false), ('keep_history', 60, false),
            ('row_continues', 20, false), ('rows_replicated', 60, true)
        ) needed (function, events, of_service)
        WHERE of_service = (name = ANY (%s)) AND events IS DISTINCT FROM events & (
            SELECT bit_or(tgtype) FROM pg_trigger
            WHERE tgrelid = id AND tgfoid = to_regproc(function) AND tgenabled IN ('O', 'A')
        )
    ))
FROM tables
LEFT JOIN pg_class ON oid = id
CROSS JOIN LATERAL (
    SELECT string_agg(concat(attnum, ':', xmin), ' ' ORDER BY attnum) AS columns
    FROM pg_attribute WHERE attrelid = id AND attnum > 0
) its_columns
CROSS JOIN LATERAL (
    SELECT string_agg(concat(oid, ':', xmin), ' ' ORDER BY oid) AS triggers FROM pg_trigger WHERE tgrelid = id
) its_triggers
GROUP BY name
"""
"""For each name: the identity of the table, of its children and of its parents, as text; and the tables of this family
that lack a trigger. `events` is the sum of the events that must fire a function: INSERT, DELETE, UPDATE and TRUNCATE
are 4, 8, 16 and 32 in pg_trigger.tgtype. A statement fires only the triggers of the table that it names: UPDATE of a
parent changes rows of its children as well.

ALTER TABLE gives a catalog row another xmin, so triggers that were disabled and enabled again differ from before.
TRUNCATE, and a statement that rewrites the table, give it another file. ANALYZE and VACUUM change neither: they
overwrite the row in pg_class in place (except the first ANALYZE after the last child table is gone). The statement
takes no lock on the tables, because a restore holds one for long. It takes 0.5 ms."""


class WatchedTable(NamedTuple):
    name: str
    identity: str
    """Another text after the table was restored, swapped, altered or truncated."""

    without_triggers: list[str]
    """The tables, of this table, its children and its parents, whose triggers are missing or disabled."""


def watched_tables(connection: Connection, names: Sequence[str]) -> list[WatchedTable]:
    """Return these tables, the history of their rows and the API keys."""
    rows = connection.execute(TABLES, ([*names, *CACHED_TABLES], [*CACHED_TABLES])).fetchall()
    return [WatchedTable(name, identity, tables or []) for name, identity, tables in rows]
