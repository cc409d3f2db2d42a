"""Check the API key of a request: is it valid, and may it write?

The edge checks the keys of cached reads by itself (edge/lua/keys.lua), and has each key's entry from `/.keys/<digest>`.
Every request that reaches an app is checked here as well.
"""

import re
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import psycopg
from flask import Flask, Response, g, request

from velikiy.coherence import Gate
from velikiy.http.browsers import READ_METHODS
from velikiy.http.problems import DETAILS
from velikiy.keys import store, tokens
from velikiy.keys.store import ApiKey, UnknownKey
from velikiy.postgres import DatabaseUnavailable
from velikiy.resources.base import FILES, RESERVED
from velikiy.resources.problems import Problem

OPEN = (RESERVED - {"console"}) | FILES | {".lease", ".keys", ".live"}
"""First segments of addresses that need no key: health checks, the documentation, and the requests of edges."""

OPEN_PAGE = re.compile(r"/|/index\.html|/console/?|/console/(key|[0-9a-f]{12}/.*|downloads/[^/]+/[^/]+)")
"""The page of the console, its files, the address at which it learns what it may do, and the addresses of downloads,
which are given out for a key (velikiy/console/exports.py)."""

CONSOLE = "/console/"
"""Data of the console need a key also where reads need none: they describe the service itself."""

NOTE_USE_S = 60.0
"""Seconds between two records of the use of one key by this process."""

CHALLENGE = "Bearer"
"""The same for a key that is missing, malformed, unknown, revoked or expired: no answer shows which keys exist."""


class Auth:
    def __init__(self, mode: str, gate: Gate) -> None:
        """`mode`: the setting AUTH."""
        self.mode = mode
        self.gate = gate
        self._noted: dict[int, float] = {}
        """When this process recorded the use of each key."""

    def check(self) -> None:
        """Refuse a request without a valid key, and a write with a key that may only read."""
        if self.mode == "off":
            return
        writes = request.method not in READ_METHODS
        path = request.path
        if path.split("/")[1] in OPEN or OPEN_PAGE.fullmatch(path):
            return
        if self.mode == "writes" and not writes and not path.startswith(CONSOLE):
            return
        key = self._key()
        if key is None:
            raise Problem("unauthorized", DETAILS[401], headers={"WWW-Authenticate": CHALLENGE})
        g.api_key = key
        if writes and key.scope != "write":
            challenge = f'{CHALLENGE} error="insufficient_scope", scope="write"'
            detail = "This API key may only read. Use a key with the scope write."
            raise Problem("forbidden", detail, headers={"WWW-Authenticate": challenge})

    def describe(self) -> dict[str, Any]:
        """Return what the sender of this request may do, for the console.

        Raises:
            Problem: The request has a key that is not valid.
            DatabaseUnavailable
        """
        key = self._key() if self.mode != "off" else None
        if key is None and self.mode != "off" and "HTTP_AUTHORIZATION" in request.environ:
            raise Problem("unauthorized", DETAILS[401], headers={"WWW-Authenticate": CHALLENGE})
        expires_at = key and key.expires_at and datetime.fromtimestamp(key.expires_at, UTC).isoformat()
        return {
            "auth": self.mode,
            "may_read": self.mode != "all" or key is not None,
            "may_write": self.mode == "off" or (key is not None and key.scope == "write"),
            "key": key and {"name": key.name, "scope": key.scope, "expires_at": expires_at},
        }

    def answer(self, digest: str) -> Response:
        """Return the entry of a key to an edge. An edge that requests it has received the key from a client."""
        try:
            answer = store.read(self.gate, digest)
        except UnknownKey:
            raise Problem("not-found", DETAILS[404]) from None
        key = ApiKey.unpack(answer.entry.body)
        if key.is_valid:
            self._note_use(key)
        response = Response(answer.entry.body, content_type="text/plain")
        # As in velikiy/http/responses.py: the entry passed the gate, and must not be stored if a writer is in flight.
        response.headers["Cache-Status"] = answer.cache_status
        if not answer.storable:
            response.headers["X-Accel-Expires"] = "0"
        return response

    def _key(self) -> ApiKey | None:
        """Return the valid key of the request, or None.

        Raises:
            DatabaseUnavailable
        """
        scheme, _, token = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        token = token.strip(" ")
        if scheme.lower() != "bearer" or not tokens.is_well_formed(token):
            return None
        try:
            key = ApiKey.unpack(store.read(self.gate, tokens.digest(token)).entry.body)
        except UnknownKey:
            return None
        if not key.is_valid:
            return None
        self._note_use(key)
        return key

    def _note_use(self, key: ApiKey) -> None:
        """Record that the key is used, in a statement of its own. A request does not fail because of it."""
        now = time.monotonic()
        if now - self._noted.get(key.id, -NOTE_USE_S) < NOTE_USE_S:
            return
        self._noted[key.id] = now
        with suppress(DatabaseUnavailable, psycopg.Error), self.gate.database.autocommit() as connection:
            store.note_use(connection, key.id)


def install(app: Flask, auth: Auth) -> None:
    @app.get("/.keys/<digest>")
    def key(digest: str) -> Response:
        if not re.fullmatch(tokens.DIGEST, digest):
            raise Problem("not-found", DETAILS[404])
        return auth.answer(digest)
