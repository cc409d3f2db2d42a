"""Carry out a request with an Idempotency-Key once: the transaction that carries it out also stores its response.

After a crash before the COMMIT nothing was done; after a crash behind it the response is stored. A refusal by the data
("taken") is stored as well: a client that repeats a key wants to know the outcome, and does not try again.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import orjson
from psycopg.types.json import Json

from velikiy.coherence import Change
from velikiy.coherence.locks import OTHERS, number_of
from velikiy.postgres import Connection
from velikiy.resources.base import Resource
from velikiy.resources.problems import RETRY_LATER, Problem

RETENTION = "24 hours"

CLEAN_UP_BATCH = 5000
"""Keys that one statement deletes, in far less than DATABASE_TIMEOUT."""

TRY_LOCK = "SELECT pg_try_advisory_xact_lock(%s, %s)"
FIND = f"SELECT request, response FROM idempotency_keys WHERE key = %s AND created_at > now() - interval '{RETENTION}'"  # noqa: S608
STORE = """
    INSERT INTO idempotency_keys (key, owner, request, response) VALUES (%s, %s, %s, %s)
    ON CONFLICT (key) DO UPDATE SET owner = excluded.owner, request = excluded.request, response = excluded.response,
        created_at = now()
"""

# The index has the answer, and the LIMIT bounds the work. The oldest of these keys is the one that makes room.
COUNT = f"""
    SELECT count(*), extract(epoch FROM min(created_at) + interval '{RETENTION}' - now())::float FROM (
        SELECT created_at FROM idempotency_keys
        WHERE owner = %s AND created_at > now() - interval '{RETENTION}' ORDER BY created_at DESC LIMIT %s) newest
"""  # noqa: S608

SHARE_BEFORE_RECOUNT = 10
"""A process counts the keys of an owner again after it has stored this part of the rest of the quota."""

REFUSED_BEFORE_RECOUNT_S = 5.0
"""An owner whose quota is used up is refused for so long without another count."""

MAX_REMEMBERED_OWNERS = 10_000

# Rows are deleted by ctid, which needs no statistics: a table that has just grown has none, and a join could take
# minutes. The rows are locked, because a key that is used again meanwhile gets a new time.
CLEAN_UP = f"""
    DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM idempotency_keys WHERE created_at < now() - interval '{RETENTION}'
        ORDER BY created_at LIMIT {CLEAN_UP_BATCH} FOR UPDATE SKIP LOCKED))
"""  # noqa: S608


FIND_ROW = "SELECT key, response FROM idempotency_keys WHERE response::text ~ %s FOR UPDATE"
REPLACE = "UPDATE idempotency_keys SET response = %s WHERE key = %s"


class Key(NamedTuple):
    """The identity of a request that may arrive more than once."""

    name: str
    """The value of the header `Idempotency-Key`, after the name of the client's API key if it has one."""

    owner: str
    """The name of the client's API key, or "~" and a digest of the client's address, or "" for an unknown client."""

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


class IdempotencyKeys:
    """The idempotency keys of all clients, with a quota for each owner."""

    def __init__(self, quota: int) -> None:
        """`quota`: keys of one owner within 24 hours, 0 for no limit."""
        self.quota = quota
        self._standings: dict[str, _Standing] = {}

    def once(self, key: Key | None, write: Write) -> Write:
        """Return a write that is carried out at most once for this key, and replays its response afterwards.

        The write raises Problem if a request with this key is in progress, if the key belongs to another request, or
        if the quota of its owner is used up.
        """
        if key is None:
            return write

        def keyed(connection: Connection) -> Change[StoredResponse]:
            digest = hashlib.sha256(key.request).digest()
            locked = connection.execute(TRY_LOCK, (OTHERS, number_of(f"idempotency {key.name}"))).fetchone()
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
            if self.quota:
                self._refuse_beyond_quota(connection, key.owner)
            try:
                with connection.transaction():  # a savepoint: a refused write leaves nothing but its response
                    change = write(connection)
            except Problem as problem:
                change = Change(StoredResponse.of_problem(problem))
            response = Json(change.outcome.to_json(), dumps=orjson.dumps)
            connection.execute(STORE, (key.name, key.owner, digest, response))
            return change

        return keyed

    def _refuse_beyond_quota(self, connection: Connection, owner: str) -> None:
        """Count the owner's keys, but not for each request: that takes some milliseconds where there are many.

        Processes count for themselves, and do not see keys that are stored just now. So an owner can have more keys
        than its quota by the number of its requests in progress, and by more only beside more than ten processes.
        """
        now = time.monotonic()
        standing = self._standings.get(owner)
        if standing is None or (standing.uncounted <= 0 and now >= standing.recount_at):
            standing = self._count(connection, owner, now)
        if standing.uncounted <= 0:
            seconds = max(1, math.ceil(standing.room_at - now))
            detail = (
                f"This client has used {self.quota} Idempotency-Keys in {RETENTION}, which is its quota. The request"
                " was not carried out. Repetitions of earlier requests and requests without the header are answered."
            )
            raise Problem("too-many-requests", detail, headers={"Retry-After": str(seconds)})
        standing.uncounted -= 1

    def _count(self, connection: Connection, owner: str, now: float) -> "_Standing":
        [(count, room_in_s)] = connection.execute(COUNT, (owner, self.quota)).fetchall()
        if count < self.quota:
            standing = _Standing(max(1, (self.quota - count) // SHARE_BEFORE_RECOUNT), recount_at=now, room_at=now)
        else:
            room_at = now + room_in_s
            standing = _Standing(0, min(room_at, now + REFUSED_BEFORE_RECOUNT_S), room_at)
        if len(self._standings) >= MAX_REMEMBERED_OWNERS:
            self._standings.clear()
        self._standings[owner] = standing
        return standing


@dataclass
class _Standing:
    """The last count of the keys of an owner, and the keys stored since."""

    uncounted: int
    """Keys that may be stored before the next count."""

    recount_at: float
    room_at: float
    """When the oldest key expires, if the quota is used up."""


def clean_up(connection: Connection) -> bool:
    """Delete keys that have expired. Return whether more of them may be left."""
    return connection.execute(CLEAN_UP).rowcount == CLEAN_UP_BATCH


def forget_row(connection: Connection, resource: Resource, row_id: int) -> int:
    """Remove this row from all responses that contain it, and return how many there are. A request that is repeated
    still is not carried out again."""
    address = resource.row_path(row_id).path
    found = connection.execute(FIND_ROW, (f'"id": ?{row_id}[,}}]',)).fetchall()
    forgotten = 0
    for key, response in found:
        members, headers = response["members"], response["headers"]
        with_row = [it for it in members.get("results", []) if it["id"] == row_id and it.pop("row", None)]
        if headers.get("Location") == address and "message" not in members:
            response["members"] = {"id": row_id, "message": "Created"}
            del headers["Preference-Applied"]
        elif not with_row:
            continue
        connection.execute(REPLACE, (Json(response, dumps=orjson.dumps), key))
        forgotten += 1
    return forgotten
