"""A request with an Idempotency-Key is done once: what came of it is kept, in the transaction that did it.

A crash can come before the COMMIT, and nothing was done, or after it, and the answer is there. Refusals that the data
gave ("taken") are kept too: whoever asks again with the same key asks what has come of it, and not for another try.
"""

import hashlib
from collections.abc import Callable

import orjson
from psycopg.types.json import Json

from velikiy.coherence import Change
from velikiy.http.problems import RETRY, Problem
from velikiy.http.requests import Key
from velikiy.http.responses import Sent
from velikiy.postgres import Connection

KEPT = "24 hours"

TAKE = "SELECT pg_try_advisory_xact_lock(%s)"
FIND = f"SELECT request, answer FROM idempotency_keys WHERE key = %s AND created_at > now() - interval '{KEPT}'"  # noqa: S608
KEEP = """
    INSERT INTO idempotency_keys (key, request, answer) VALUES (%s, %s, %s)
    ON CONFLICT (key) DO UPDATE SET request = excluded.request, answer = excluded.answer, created_at = now()
"""
SOME = 5000
"""Keys that are forgotten at once: in far less than DATABASE_TIMEOUT."""

# By their places, which needs no statistics: a table that has just grown has none, and a join might take minutes.
# Locked, since a key that is used again in between has a new time.
CLEAN_UP = f"""
    DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM idempotency_keys WHERE created_at < now() - interval '{KEPT}'
        ORDER BY created_at LIMIT {SOME} FOR UPDATE SKIP LOCKED))
"""  # noqa: S608


def once(key: Key | None, change: Callable[[Connection], Change[Sent]]) -> Callable[[Connection], Change[Sent]]:
    """The change, for `Gate.write`; where it was done before, only its answer.

    Raises, when it runs: Problem, where the key is in use, or was used for something else.
    """
    if key is None:
        return change

    def keyed(connection: Connection) -> Change[Sent]:
        digest = hashlib.sha256(key.request).digest()
        taken = connection.execute(TAKE, (_lock(key),)).fetchone()
        if not taken or not taken[0]:
            detail = "A request with this Idempotency-Key is still in progress. Retry in a second."
            raise Problem("in-flight", detail, headers=RETRY)
        kept = connection.execute(FIND, (key.name,)).fetchone()
        if kept:
            if bytes(kept[0]) != digest:
                raise Problem(
                    "key-reused", "This Idempotency-Key was already used for a different request. Use a new key."
                )
            return Change(Sent.of(kept[1]).again())
        try:
            with connection.transaction():  # a savepoint: what was refused leaves nothing but its answer
                done = change(connection)
        except Problem as refusal:
            done = Change(Sent.refused(refusal))
        connection.execute(KEEP, (key.name, digest, Json(done.outcome.kept(), dumps=orjson.dumps)))
        return done

    return keyed


def clean_up(connection: Connection) -> bool:
    """Forget what nobody can ask for any more; whether there may be more of it."""
    return connection.execute(CLEAN_UP).rowcount == SOME


def _lock(key: Key) -> int:
    return int.from_bytes(hashlib.blake2b(b"idempotency " + key.name.encode(), digest_size=8).digest(), signed=True)
