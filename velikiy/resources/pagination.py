"""Pages of a list: which rows a page shows, and the address of the next page.

The pages follow the keyset method: a cursor contains the sort value and the id of a page's last row, and the next page
starts behind it. A page costs the same at any depth. Rows that are written meanwhile neither repeat nor hide other
rows, unlike with OFFSET.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, LiteralString
from urllib.parse import quote

import orjson
from psycopg import sql

from velikiy.resources.base import MAX_ID, Resource, Sort

MAX_PAGE_ROWS = 1000
"""The largest number of rows on a page, and the default."""

SORTABLE_ROWS = 10_000
"""Rows, as PostgreSQL estimates: the matches of a search are sorted at once if there are no more."""

MIN_SCAN_FACTOR = 20
"""Rows of an order that are scanned for each row of a page, at least, before more than SORTABLE_ROWS are sorted."""

SCAN_THE_NEXT_ROWS: LiteralString = (
    "SELECT {columns} FROM (SELECT * FROM {table} WHERE {after} ORDER BY {key} {direction}, id {direction} LIMIT %s) n"
    " WHERE {matches} LIMIT %s"
)
SORT_ALL_MATCHES: LiteralString = (
    "SELECT {columns} FROM {table} WHERE {after} AND {matches} ORDER BY {order} {direction}, id {direction} LIMIT %s"
)
"""For a search, `order` wraps the key into coalesce() to hide it from its index. PostgreSQL assumes that matches are
spread evenly, and would follow the index through the whole table to matches that stand at its end."""

BY_ID = Sort("id", "bigint")

SORT_VALUES = {
    "bigint": "-?[0-9]{1,19}",
    "timestamptz": r"[0-9]{4,}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9.]{2,}\+00( BC)?",
}
"""Sort values as PostgreSQL prints them, by type. PostgreSQL reads more: `now` would be another value each time, in one
entry of a cache."""


class BadCursor(ValueError):
    """The cursor is not from this service, or belongs to another order."""


@dataclass(frozen=True)
class Page:
    """A page of a list, as a client requests it."""

    limit: int = MAX_PAGE_ROWS
    sort: str = "id"
    """A key of `Resource.sort_keys`. A `-` before it reverses the order."""

    q: str = ""
    """Words. A row matches if it contains each of them, or words that begin with them."""

    cursor: str = ""

    filters: Mapping[str, str] = field(default_factory=dict)
    """Values by the names of `Resource.filters`."""

    @property
    def variant(self) -> str:
        """The query in its one spelling: the parameters that differ from their defaults, sorted by name. The edge
        spells queries in the same way (edge/lua/read.lua:canonical)."""
        parameters = (
            ("cursor", self.cursor, ""),
            ("limit", self.limit, MAX_PAGE_ROWS),
            ("q", self.q, ""),
            ("sort", self.sort, "id"),
            *((name, value, "") for name, value in self.filters.items()),
        )
        return "&".join(
            f"{name}={quote(str(value), safe='')}" for name, value, default in sorted(parameters) if value != default
        )


def columns(resource: Resource) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, resource.columns))


def select(resource: Resource, page: Page, *, scan_window: int = 0) -> tuple[sql.Composed, list[Any]]:
    """Return the statement of a page and its values.

    The statement returns rows of `id, sort value, JSON`, one more than the page has if there is a next page.

    Args:
        scan_window: Search only so many rows that follow next in the order; 0 searches all.

    Raises:
        BadCursor
    """
    sort = resource.sort_keys.get(page.sort.removeprefix("-"), BY_ID)
    key, descending = sql.SQL(sort.expression), page.sort.startswith("-")
    after, position = sql.Composed([sql.SQL("true")]), list[Any]()
    if page.cursor:
        position = [*decode_cursor(page.cursor, page.sort, sort)]
        after = sql.SQL("({key}, id) {beyond} (%s::{type}, %s)").format(
            key=key, beyond=sql.SQL("<" if descending else ">"), type=sql.SQL(sort.type)
        )
    matches, wanted = matching(resource, page)
    if scan_window:
        rows, values = SCAN_THE_NEXT_ROWS, [*position, scan_window, *wanted, page.limit + 1]
    else:
        rows, values = SORT_ALL_MATCHES, [*position, *wanted, page.limit + 1]
    statement = sql.SQL("SELECT id, ({key})::text, row_to_json(r)::text FROM ({rows}) r").format(
        key=key,
        rows=sql.SQL(rows).format(
            columns=columns(resource),
            table=sql.Identifier(resource.name),
            after=after,
            matches=matches,
            key=key,
            order=sql.SQL("coalesce({key}, {key})").format(key=key) if wanted else key,
            direction=sql.SQL("DESC" if descending else "ASC"),
        ),
    )
    return statement, values


def estimate(resource: Resource, page: Page) -> tuple[sql.Composed, list[Any]]:
    """Return a statement that reports how many matches PostgreSQL expects. It only plans the search."""
    matches, wanted = matching(resource, page)
    statement = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} WHERE {}").format(sql.Identifier(resource.name), matches)
    return statement, wanted


def scan_window(page: Page, expected: int, rows: int) -> int:
    """Return how many rows of the order to scan for a page of a search that has `expected` matches among `rows`.

    0 means that sorting all matches is cheaper. The window is twice what evenly spread matches need, because a scan
    that finds too few is followed by the sort.
    """
    window = max(MIN_SCAN_FACTOR, 2 * rows // expected) * page.limit
    return window if window <= expected else 0


def matching(resource: Resource, page: Page) -> tuple[sql.Composed, list[Any]]:
    """Return the condition of the page's search and filters, and its values.

    A word without a letter or digit matches nothing (SQL's words() of it is null). It is ignored beside other words.
    """
    words = [word for word in page.q.split() if any(map(str.isalnum, word))] or page.q.split()
    condition = sql.Composed([sql.SQL("true")])
    for _ in words:
        column = sql.Identifier(resource.search_column or "")
        condition += sql.SQL(" AND {} LIKE '%%' || words(%s) || '%%'").format(column)
    for name in page.filters:
        condition += sql.SQL(" AND ") + sql.SQL(resource.filters[name].condition)
    return condition, [*words, *page.filters.values()]


def link(resource: Resource, page: Page, rows: list[Any]) -> str:
    """Return the `Link` header (RFC 8288) of a page, empty if the page is the whole list. `rows`: the result of
    `select`."""
    return links(resource.list_path.path, page, next_cursor(page, rows))


def next_cursor(page: Page, rows: list[Any]) -> str:
    """Return the cursor behind the page, empty if it is the last one. `rows`: the result of `select`."""
    if len(rows) <= page.limit:
        return ""
    last_id, sort_value, _ = rows[page.limit - 1]
    return encode_cursor(page.sort, sort_value, last_id)


def links(address: str, page: Page, next_cursor: str) -> str:
    """Return the `Link` header of a page at this address. `next_cursor` is empty for the last page."""
    pages = {"next": replace(page, cursor=next_cursor)} if next_cursor else {}
    if pages or page.cursor:
        pages["first"] = replace(page, cursor="")
    return ", ".join(
        f'<{address}{"?" if it.variant else ""}{it.variant}>; rel="{relation}"' for relation, it in pages.items()
    )


# ---- cursors: opaque to clients, so that their content can change ----


def encode_cursor(sort: str, sort_value: str, row_id: int) -> str:
    """Return the cursor behind the row with this id and sort value."""
    return base64.urlsafe_b64encode(orjson.dumps([sort, sort_value, row_id])).rstrip(b"=").decode()


def decode_cursor(cursor: str, sort: str, key: Sort) -> tuple[str, int]:
    """Return the sort value and the id.

    Raises:
        BadCursor
    """
    try:
        encoded_sort, sort_value, row_id = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, TypeError, binascii.Error):
        raise BadCursor from None
    # type(): True is an int as well, and PostgreSQL would not compare it with an id.
    valid = encoded_sort == sort and isinstance(sort_value, str) and type(row_id) is int and 0 < row_id <= MAX_ID
    valid = valid and bool(re.fullmatch(SORT_VALUES.get(key.type, ".*"), sort_value, re.DOTALL))
    # Base64 and JSON have many spellings for one cursor. Only the spelling of `encode_cursor` is accepted.
    if not valid or encode_cursor(sort, sort_value, row_id) != cursor:
        raise BadCursor
    return sort_value, row_id
