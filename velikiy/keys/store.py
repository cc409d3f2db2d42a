"""The table `api_keys`, and a key as a cached path."""

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import dict_row

from velikiy.coherence import Answer, CachePath, Change, Entry, Gate
from velikiy.keys import tokens
from velikiy.postgres import Connection, Statement

SCOPES = ("read", "write")
"""`write` includes `read`."""

NO_SCOPE = "none"
"""The scope of a revoked key."""

NAME = "[A-Za-z][A-Za-z0-9._-]{0,63}"
"""The form of a key's name. A number would be an id. The log contains names, so e-mail addresses are refused."""

FIND = """
SELECT CASE WHEN revoked_at IS NULL THEN scope ELSE 'none' END,
    coalesce(floor(extract(epoch FROM expires_at))::bigint::text, 'never'), id, name
FROM api_keys WHERE digest = $1
"""

LIVE = "revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())"

LIST = """
SELECT id, name, scope, shown, created_at, expires_at, last_used_at, revoked_at
FROM api_keys WHERE revoked_at IS NULL OR %s ORDER BY name, id
"""

INSERT = """
INSERT INTO api_keys (name, scope, digest, shown, expires_at) VALUES (%s, %s, %s, %s, %s) RETURNING id
"""

# Responses under idempotency keys belong to the name of an API key (velikiy/resources/idempotency.py). A key that was
# revoked may have left some, and a new key of its name must not receive them.
FORGET_RESPONSES = "DELETE FROM idempotency_keys WHERE owner = %s"

REVOKE = """
UPDATE api_keys SET revoked_at = now() WHERE (id::text = %(which)s OR name = %(which)s) AND revoked_at IS NULL
RETURNING id, digest
"""

# The newest of several: an older one is still valid after a rotation with an overlap.
SUCCEED = f"""
SELECT id, scope, digest, expires_at - created_at FROM api_keys
WHERE name = %s AND {LIVE} AND NOT replaced FOR UPDATE
"""  # noqa: S608

REPLACE = """
UPDATE api_keys SET
    replaced = true,
    expires_at = least(expires_at, now() + %(overlap)s),
    revoked_at = CASE WHEN %(overlap)s = interval '0' THEN now() END
WHERE id = %(id)s
"""

# Rows that another process updates just now are left alone: to wait for it would delay a request.
USED = """
UPDATE api_keys SET last_used_at = now() WHERE id = (SELECT id FROM api_keys WHERE id = %s FOR UPDATE SKIP LOCKED)
"""


NO_OVERLAP = timedelta(0)
"""The old key of a rotation is revoked at once."""


class UnknownKey(Exception):
    """No key has this digest. Caches store nothing about it: anyone can make up any number of keys."""


class NoSuchKey(Exception):
    """An operator named a key that does not exist or is not valid any more."""


class NameTaken(Exception):
    """Another key, which is not revoked, has this name."""


class ApiKey(NamedTuple):
    """The rights of a key, as caches store them."""

    id: int
    name: str
    scope: str
    """`read`, `write`, or `none` if the key is revoked."""

    expires_at: int | None
    """The second of Unix time at which the key is refused."""

    @classmethod
    def unpack(cls, stored: bytes) -> "ApiKey":
        scope, expires_at, key_id, name = stored.decode().split(" ")
        return cls(int(key_id), name, scope, None if expires_at == "never" else int(expires_at))

    @property
    def is_valid(self) -> bool:
        return self.scope != NO_SCOPE and (self.expires_at is None or time.time() < self.expires_at)


class Created(NamedTuple):
    """A new key. Its token is known only now."""

    id: int
    name: str
    scope: str
    expires_at: datetime | None
    token: str


def path_of(digest: str) -> CachePath:
    return CachePath(f"/.keys/{digest}", f"api_key:{digest}")


def read(gate: Gate, digest: str) -> Answer:
    """Return the entry of a key: `<scope> <second at which it expires, or never> <id> <name>`.

    The key is read from PostgreSQL, and never from Redis: a program that writes into Redis could make up a key there.

    Raises:
        UnknownKey
        DatabaseUnavailable
    """

    def load(connection: Connection) -> Entry:
        [rows] = connection.query(Statement(FIND, (digest,)))
        if not rows:
            raise UnknownKey
        return Entry(200, b" ".join(rows[0]))

    return gate.read(path_of(digest), "", load, from_edge=None)


def create(gate: Gate, name: str, scope: str, expires_at: datetime | None) -> Created:
    """Create a key. No cache can have an entry of it.

    Raises:
        NameTaken
    """
    assert re.fullmatch(NAME, name)

    def change(connection: Connection) -> Change[Created]:
        connection.execute(FORGET_RESPONSES, (name,))
        return Change(_insert(connection, name, scope, expires_at))

    return gate.write(change)


def revoke(gate: Gate, which: str) -> list[int]:
    """Revoke the key with this id, or every key with this name, and return the ids. When this function returns, no
    edge and no app accepts the keys any longer.

    Raises:
        NoSuchKey
    """

    def change(connection: Connection) -> Change[list[int]]:
        revoked = connection.execute(REVOKE, {"which": which}).fetchall()
        if not revoked:
            raise NoSuchKey
        return Change([key_id for key_id, _ in revoked], [path_of(digest) for _, digest in revoked])

    return gate.write(change)


def rotate(gate: Gate, name: str, overlap: timedelta, expires_at: datetime | None) -> Created:
    """Replace the key of this name with a new one of the same scope.

    Args:
        gate: The gate of the database.
        name: The name of the key.
        overlap: The time for which the old key stays valid, zero for none.
        expires_at: When the new key expires. None: it lives as long as the old key was to live.

    Raises:
        NoSuchKey
    """

    def change(connection: Connection) -> Change[Created]:
        found = connection.execute(SUCCEED, (name,)).fetchone()
        if not found:
            raise NoSuchKey
        key_id, scope, digest, lifetime = found
        connection.execute(REPLACE, {"id": key_id, "overlap": overlap})
        until = expires_at or (datetime.now(UTC).replace(microsecond=0) + lifetime if lifetime else None)
        return Change(_insert(connection, name, scope, until), [path_of(digest)])

    return gate.write(change)


def listed(connection: Connection, *, with_revoked: bool) -> Sequence[dict[str, Any]]:
    """Return a row for each key, without its digest."""
    return connection.cursor(row_factory=dict_row).execute(LIST, (with_revoked,)).fetchall()


def note_use(connection: Connection, key_id: int) -> None:
    connection.execute(USED, (key_id,))


def _insert(connection: Connection, name: str, scope: str, expires_at: datetime | None) -> Created:
    token = tokens.new()
    values = (name, scope, tokens.digest(token), token[: tokens.SHOWN_CHARACTERS], expires_at)
    try:
        [(key_id,)] = connection.execute(INSERT, values).fetchall()
    except psycopg.errors.UniqueViolation:
        raise NameTaken from None
    return Created(key_id, name, scope, expires_at, token)
