"""Lists: which rows are on a page, and how the next one is asked for.

By keyset: a cursor holds the last row's place in the order, and the next page begins after it. It costs the same at any
depth, and rows that come or go meanwhile neither repeat nor hide others, unlike with OFFSET.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, LiteralString
from urllib.parse import quote

import orjson
from psycopg import sql

from velikiy.resources.base import Resource, Sort

LIMIT = 1000
"""Rows on one page, at most and where nobody asks for less."""

FEW = 10_000
"""Rows, as PostgreSQL estimates: what a search finds is sorted at once if it is no more than that."""

NEAR = 20
"""Rows of an order that are looked at for each of a page's, at least, before more than FEW are sorted."""

AMONG_THE_NEXT: LiteralString = (
    "SELECT {columns} FROM (SELECT * FROM {table} WHERE {after} ORDER BY {key} {way}, id {way} LIMIT %s) n"
    " WHERE {found} LIMIT %s"
)
AMONG_ALL: LiteralString = (
    "SELECT {columns} FROM {table} WHERE {after} AND {found} ORDER BY {order} {way}, id {way} LIMIT %s"
)
"""Of what a search finds `order` hides the key from its index, by coalesce(): PostgreSQL takes words to be spread
evenly, and would follow the index through the whole table to those that stand at its end."""

BY_ID = Sort("id", "bigint")


SPELLED = {
    "bigint": "-?[0-9]{1,19}",
    "timestamptz": r"[0-9]{4,}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9.]{2,}\+00( BC)?",
}
"""Places as PostgreSQL writes them. It reads more: `now` would be another place each time, in one entry of a cache."""


class BadCursor(ValueError):
    """A cursor that this service did not make, or made for another order."""


@dataclass(frozen=True)
class Page:
    """What a client asks of a list."""

    limit: int = LIMIT
    sort: str = "id"
    """A key of the resource's `sorts`, with `-` before it from the last to the first."""

    q: str = ""
    """Words, each of which a row has, or one that begins with it."""

    cursor: str = ""

    @property
    def variant(self) -> str:
        """One spelling for one page: the parameters that are not what they are without being given, sorted."""
        return "&".join(
            f"{name}={quote(str(value), safe='')}"
            for name, value, usual in (
                ("cursor", self.cursor, ""),
                ("limit", self.limit, LIMIT),
                ("q", self.q, ""),
                ("sort", self.sort, "id"),
            )
            if value != usual
        )


def columns(resource: Resource) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, resource.columns))


def select(resource: Resource, page: Page, *, near: int = 0) -> tuple[sql.Composed, list[Any]]:
    """Rows of `id, place in the order, JSON`: one more than the page has, where there is a next page. `near`: only of
    so many that follow next in the order.

    Raises:
        BadCursor
    """
    by = resource.sorts.get(page.sort.removeprefix("-"), BY_ID)
    key, falling = sql.SQL(by.expression), page.sort.startswith("-")
    after, places = sql.Composed([sql.SQL("true")]), list[Any]()
    if page.cursor:
        places = [*_read(page.cursor, page.sort, by)]
        after = sql.SQL("({key}, id) {after} (%s::{type}, %s)").format(
            key=key, after=sql.SQL("<" if falling else ">"), type=sql.SQL(by.type)
        )
    found, words = matching(resource, page.q)
    if near:
        rows, values = AMONG_THE_NEXT, [*places, near, *words, page.limit + 1]
    else:
        rows, values = AMONG_ALL, [*places, *words, page.limit + 1]
    statement = sql.SQL("SELECT id, ({key})::text, row_to_json(r)::text FROM ({rows}) r").format(
        key=key,
        rows=sql.SQL(rows).format(
            columns=columns(resource),
            table=sql.Identifier(resource.name),
            after=after,
            found=found,
            key=key,
            order=sql.SQL("coalesce({key}, {key})").format(key=key) if words else key,
            way=sql.SQL("DESC" if falling else "ASC"),
        ),
    )
    return statement, values


def estimate(resource: Resource, page: Page) -> tuple[sql.Composed, list[Any]]:
    """A statement that tells what PostgreSQL expects a search to find; it costs nothing but planning."""
    found, words = matching(resource, page.q)
    statement = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} WHERE {}").format(sql.Identifier(resource.name), found)
    return statement, words


def near(page: Page, expected: int, rows: int) -> int:
    """How many rows of the order to look at for a page of a search that finds `expected` of all; none where it is
    cheaper to sort what it finds. Twice what would do if it were spread evenly: to have looked in vain costs both."""
    looked_at = max(NEAR, 2 * rows // expected) * page.limit
    return looked_at if looked_at <= expected else 0


def matching(resource: Resource, q: str) -> tuple[sql.Composed, list[Any]]:
    """A condition and its values. What has no letter and no digit is found nowhere (words() of it is null), and is left
    out where there is something else."""
    words = [word for word in q.split() if any(map(str.isalnum, word))] or q.split()
    condition = sql.Composed([sql.SQL("true")])
    for _ in words:
        condition += sql.SQL(" AND {} LIKE '%%' || words(%s) || '%%'").format(sql.Identifier(resource.words or ""))
    return condition, [*words]


def link(resource: Resource, page: Page, rows: list[Any]) -> str:
    """The `Link` header (RFC 8288) of a page; `rows` are those of `select`. Empty where it is the whole list."""
    links = []
    if len(rows) > page.limit:
        number, place, _ = rows[page.limit - 1]
        links.append(_link(resource, Page(page.limit, page.sort, page.q, _write(page.sort, place, number)), "next"))
    if links or page.cursor:
        links.append(_link(resource, Page(page.limit, page.sort, page.q), "first"))
    return ", ".join(links)


def _link(resource: Resource, page: Page, relation: str) -> str:
    return f'<{resource.all.path}{"?" if page.variant else ""}{page.variant}>; rel="{relation}"'


# ---- cursors: opaque to clients, so that what they hold can change ----


def _write(sort: str, place: str, number: int) -> str:
    return base64.urlsafe_b64encode(orjson.dumps([sort, place, number])).rstrip(b"=").decode()


def _read(cursor: str, sort: str, by: Sort) -> tuple[str, int]:
    try:
        made_for, place, number = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, TypeError, binascii.Error):
        raise BadCursor from None
    # type(): true is an int as well, and PostgreSQL would not compare it with an id.
    sound = made_for == sort and isinstance(place, str) and type(number) is int and 0 < number < 2**63
    sound = sound and bool(re.fullmatch(SPELLED.get(by.type, ".*"), place, re.DOTALL))
    # The spelling that we make and no other: base64 and JSON have many for one cursor.
    if not sound or _write(sort, place, number) != cursor:
        raise BadCursor
    return place, number
