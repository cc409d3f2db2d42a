"""The history of a row: each version with who made it, when and how, also of a row that was deleted.

Triggers add an entry for each change, in its transaction (migrations/sql/row_history.sql). An entry has the row as it
was before the change, so a version is put together from two places: the entry that made it says who and when, and the
next entry, or the table, has the row.
"""

from typing import LiteralString

from psycopg import sql

from velikiy.coherence import Change, Entry, found
from velikiy.postgres import Connection, Statement
from velikiy.resources import idempotency, pagination
from velikiy.resources.base import HISTORY, MAX_ID, Resource, registry
from velikiy.resources.pagination import BY_ID, BadCursor, Page

CURSOR = "history"
"""The order in the cursors of histories. Cursors of lists have others, and are not valid here."""

SELECT: LiteralString = """
WITH entries AS MATERIALIZED (
    (SELECT * FROM row_history WHERE resource = {name} AND row_id = $1 AND version >= $2 ORDER BY version LIMIT 1)
    UNION ALL
    (SELECT * FROM row_history WHERE resource = {name} AND row_id = $1 AND version < $2 ORDER BY version DESC LIMIT $3)
), versions AS (
    SELECT {columns} FROM {table} r WHERE id = $1
    UNION ALL
    SELECT {columns} FROM entries, jsonb_populate_record(NULL::{table}, entries.before) r
    WHERE entries.before IS NOT NULL
)
SELECT version, row_to_json(item)::text FROM (
    SELECT version, entries.change, coalesce(entries.changed_at, versions.updated_at) AS changed_at,
        entries.changed_by, entries.through, row_to_json(versions) AS row
    FROM entries FULL JOIN versions USING (version) WHERE version < $2 ORDER BY version DESC LIMIT $3
) item
"""
"""The versions before a version ($2), newest first. The first entry above them has the row of the newest of them."""

PURGE_BATCH = 500
"""Entries that one step of a purge removes. It invalidates the path of each row, which then costs a miss."""

# The entries are locked, because relays may purge at the same time. As for idempotency keys, ctid needs no statistics.
PURGE = f"""
WITH expired AS (
    DELETE FROM row_history WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM row_history WHERE changed_at < now() - make_interval(days => $1)
        ORDER BY changed_at LIMIT {PURGE_BATCH} FOR UPDATE SKIP LOCKED))
    RETURNING resource, row_id
)
SELECT resource, row_id, count(*) FROM expired GROUP BY 1, 2
"""  # noqa: S608

LATEST = (
    "SELECT max(version), count(*), bool_and(change = 'erase') FROM row_history WHERE resource = $1 AND row_id = $2"
)
ERASE = "DELETE FROM row_history WHERE resource = $1 AND row_id = $2"
NOTE_ERASURE = """
INSERT INTO row_history (resource, row_id, version, change, changed_by, through)
VALUES ($1, $2, $3, 'erase', $4, 'command')
"""
"""An entry without personal data remains, so that the versions of the id go on."""


def variant(page: Page) -> str:
    """Return the variant of the row's path, spelled as the edge does (edge/lua/addresses.lua)."""
    return f"{HISTORY}{'?' if page.variant else ''}{page.variant}"


class Histories:
    """The histories of the rows of one resource."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self._select = (
            sql.SQL(SELECT)
            .format(
                name=sql.Literal(resource.name),
                table=sql.Identifier(resource.name),
                columns=sql.SQL(", ").join(sql.Identifier("r", column) for column in resource.columns),
            )
            .as_string()
        )

    def before(self, row_id: int, page: Page) -> int:
        """Return the version before which the page begins.

        Raises:
            BadCursor
        """
        if not page.cursor:
            return MAX_ID
        version, cursor_id = pagination.decode_cursor(page.cursor, CURSOR, BY_ID)
        if cursor_id != row_id or not 0 < int(version) <= MAX_ID:
            raise BadCursor
        return int(version)

    def load(self, connection: Connection, row_id: int, page: Page, before: int) -> Entry | None:
        """Return the page as a JSON array, or None if no row ever had this id."""
        (rows,) = connection.query(Statement(self._select, (row_id, before, page.limit + 1)))
        if not rows and not page.cursor:
            return None
        shown = rows[: page.limit]
        cursor = pagination.encode_cursor(CURSOR, shown[-1][0].decode(), row_id) if len(rows) > page.limit else ""
        link = pagination.links(self.resource.history_address(row_id), page, cursor)
        return found(b"[%b]" % b",".join(item for _, item in shown), link=link)


def purge(connection: Connection, days: int) -> Change[bool]:
    """Remove some of the entries of changes that are older, with the rows as they were before these changes. Return
    whether more of them may be left."""
    (rows,) = connection.query(Statement(PURGE, (days,)))
    purged = [(registry().get(resource.decode()), int(row_id), int(count)) for resource, row_id, count in rows]
    paths = [resource.row_path(row_id) for resource, row_id, _ in purged if resource]
    return Change(sum(count for _, _, count in purged) == PURGE_BATCH, paths)


class StillExists(Exception):
    """The row was not deleted."""


def erase(connection: Connection, resource: Resource, row_id: int, *, delete: bool, command: str) -> Change[int | None]:
    """Remove everything that the service knows of a deleted row, for good. Return the number of its entries, None if it
    knows nothing.

    Args:
        delete: Delete the row if it exists.
        command: The name of the command, which the history shows.

    Raises:
        StillExists
    """
    names = {"table": sql.Identifier(resource.name)}
    if connection.execute(sql.SQL("SELECT FROM {table} WHERE id = %s FOR UPDATE").format(**names), (row_id,)).rowcount:
        if not delete:
            raise StillExists
        connection.execute(sql.SQL("DELETE FROM {table} WHERE id = %s").format(**names), (row_id,))
    ((latest, count, is_erased),) = connection.query(Statement(LATEST, (resource.name, row_id)))[0]
    responses = idempotency.forget_row(connection, resource, row_id)
    if latest is None or is_erased == b"t":
        return Change(0 if responses else None, resource.invalidated_by(row_id))
    connection.query(
        Statement(ERASE, (resource.name, row_id)),
        Statement(NOTE_ERASURE, (resource.name, row_id, int(latest) + 1, command)),
    )
    return Change(int(count), resource.invalidated_by(row_id))
