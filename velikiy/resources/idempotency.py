"""Carry out a request with an Idempotency-Key once: the transaction that carries it out also stores its response.

After a crash before the COMMIT nothing was done; after a crash behind it the response is stored. A refusal by the data
("taken") is stored as well: a client that repeats a key wants to know the outcome, and does not try again.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import orjson
from psycopg.types.json import Json

from velikiy.coherence import Change
from velikiy.postgres import Connection
from velikiy.resources.problems import RETRY_LATER, Problem

RETENTION = "24 hours"

CLEAN_UP_BATCH = 5000
"""Keys that one statement deletes, in far less than DATABASE_TIMEOUT."""

TRY_LOCK = "SELECT pg_try_advisory_xact_lock(%s)"
FIND = f"SELECT request, response FROM idempotency_keys WHERE key = %s AND created_at > now() - interval '{RETENTION}'"  # noqa: S608
STORE = """
    INSERT INTO idempotency_keys (key, request, response) VALUES (%s, %s, %s)
    ON CONFLICT (key) DO UPDATE SET request = excluded.request, response = excluded.response, created_at = now()
"""

# Rows are deleted by ctid, which needs no statistics: a table that has just grown has none, and a join could take
# minutes. The rows are locked, because a key that is used again meanwhile gets a new time.
CLEAN_UP = f"""
    DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM idempotency_keys WHERE created_at < now() - interval '{RETENTION}'
        ORDER BY created_at LIMIT {CLEAN_UP_BATCH} FOR UPDATE SKIP LOCKED))
"""  # noqa: S608


class Key(NamedTuple):
    """The identity of a request that may arrive more than once."""

    name: str
    """The value of the header `Idempotency-Key`, after the name of the client's API key if it has one."""

    request: bytes
    """Method, path and body, normalised: whitespace and the order of members make no difference."""


@dataclass(frozen=True)
class StoredResponse:
    """The response to a write, in a form that can be stored."""

    status: int
    members: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    """The kind of problem, or empty for a success."""

    @classmethod
    def of_problem(cls, problem: Problem) -> "StoredResponse":
        members = {"detail": problem.detail, "errors": problem.errors}
        return cls(problem.status, members, problem.headers, problem.kind)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "StoredResponse":
        return cls(**stored)

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status, "members": self.members, "headers": self.headers, "problem": self.problem}

    def as_replay(self) -> "StoredResponse":
        return replace(self, headers={**self.headers, "Idempotency-Replayed": "true"})


Write = Callable[[Connection], Change[StoredResponse]]
"""A change for `Gate.write` with the response to it."""


def once(key: Key | None, write: Write) -> Write:
    """Return a write that is carried out at most once for this key, and replays its response afterwards.

    The write raises Problem if a request with this key is in progress, or if the key belongs to another request.
    """
    if key is None:
        return write

    def keyed(connection: Connection) -> Change[StoredResponse]:
        digest = hashlib.sha256(key.request).digest()
        locked = connection.execute(TRY_LOCK, (_lock_id(key),)).fetchone()
        if not locked or not locked[0]:
            detail = "A request with this Idempotency-Key is still in progress. Retry in a second."
            raise Problem("in-flight", detail, headers=RETRY_LATER)
        stored = connection.execute(FIND, (key.name,)).fetchone()
        if stored:
            if bytes(stored[0]) != digest:
                raise Problem(
                    "key-reused", "This Idempotency-Key was already used for a different request. Use a new key."
                )
            return Change(StoredResponse.from_json(stored[1]).as_replay())
        try:
            with connection.transaction():  # a savepoint: a refused write leaves nothing but its response
                change = write(connection)
        except Problem as problem:
            change = Change(StoredResponse.of_problem(problem))
        connection.execute(STORE, (key.name, digest, Json(change.outcome.to_json(), dumps=orjson.dumps)))
        return change

    return keyed


def clean_up(connection: Connection) -> bool:
    """Delete keys that have expired. Return whether more of them may be left."""
    return connection.execute(CLEAN_UP).rowcount == CLEAN_UP_BATCH


def _lock_id(key: Key) -> int:
    return int.from_bytes(hashlib.blake2b(b"idempotency " + key.name.encode(), digest_size=8).digest(), signed=True)
