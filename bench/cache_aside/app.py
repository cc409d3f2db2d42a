"""A users service of the usual design: a connection to PostgreSQL for each request, cache-aside in Redis, and keys that
are deleted after COMMIT.

It is a fair peer: its races are those of the design, and it wastes no time on purpose. With CACHES=off the same service
is correct, in the only way that the design knows: without its caches.
"""

import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Annotated, Any, TypeVar

import orjson
import psycopg2
from flask import Flask, Response, abort, request
from psycopg2.errors import UniqueViolation
from psycopg2.extras import RealDictCursor
from pydantic import BaseModel, EmailStr, StringConstraints, ValidationError
from redis import Redis
from werkzeug.exceptions import HTTPException

B = TypeVar("B", bound=BaseModel)

TTL = int(os.environ.get("REDIS_TTL", "60"))
"""Seconds."""

CACHED = os.environ.get("CACHES") != "off"

PAGES = "users"
"""A hash with all pages of the list, so that a write deletes them by one key. A SCAN for them would cost more."""

MAX_PAGE_ROWS = 1000

SELECT_ONE = "SELECT id, name, email, created_at, updated_at, version FROM users WHERE id = %s"
SELECT_PAGE = "SELECT id, name, email, created_at, updated_at, version FROM users WHERE id > %s ORDER BY id LIMIT %s"
INSERT = "INSERT INTO users (name, email) VALUES (%s, %s) RETURNING id"
UPDATE = "UPDATE users SET name = coalesce(%s, name), email = coalesce(%s, email) WHERE id = %s RETURNING id"
DELETE = "DELETE FROM users WHERE id = %s RETURNING id"

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]


class NewUser(BaseModel, extra="forbid"):
    name: Name
    email: EmailStr


class Changes(BaseModel, extra="forbid"):
    name: Name | None = None
    email: EmailStr | None = None


def create_app() -> Flask:
    app = Flask(__name__)
    cache = Redis.from_url(os.environ["REDIS_URL"])

    @app.get("/users/<int(min=1, max=9223372036854775807):user_id>")
    def get_user(user_id: int) -> Response:
        key = f"user:{user_id}"
        body: Any = cache.get(key) if CACHED else None
        if body is None:
            with database() as cursor:
                cursor.execute(SELECT_ONE, (user_id,))
                row = cursor.fetchone()
            if row is None:
                abort(404, f"There is no user {user_id}.")
            body = orjson.dumps(row)
            if CACHED:
                cache.setex(key, TTL, body)
        return respond(body)

    @app.get("/users")
    def list_users() -> Response:
        after, limit = parameter("cursor", 0, 0, 2**63 - 1), parameter("limit", MAX_PAGE_ROWS, 1, MAX_PAGE_ROWS)
        page = f"{after}:{limit}"
        stored: Any = cache.hget(PAGES, page) if CACHED else None
        if stored is None:
            with database() as cursor:
                cursor.execute(SELECT_PAGE, (after, limit + 1))
                rows = cursor.fetchall()
            link = f'</users?cursor={rows[limit - 1]["id"]}&limit={limit}>; rel="next"' if len(rows) > limit else ""
            stored = link.encode() + b"\n" + orjson.dumps(rows[:limit])
            if CACHED:
                with cache.pipeline(transaction=False) as fill:  # the rights in Redis lack transactions
                    fill.hset(PAGES, page, stored)
                    fill.expire(PAGES, TTL, nx=True)  # a page that is added later does not prolong the others
                    fill.execute()
        link, _, body = stored.partition(b"\n")
        response = respond(body)
        if link:
            response.headers["Link"] = link.decode()
        return response

    @app.post("/users")
    def create_user() -> Response:
        user = parse_body(NewUser)
        user_id = write(INSERT, (user.name, user.email))
        response = respond(orjson.dumps({"id": user_id, "message": "Created"}), 201)
        response.headers["Location"] = f"/users/{user_id}"
        return response

    @app.put("/users/<int(min=1, max=9223372036854775807):user_id>")
    def update_user(user_id: int) -> Response:
        changes = parse_body(Changes)
        if changes.name is None and changes.email is None:
            abort(422, "Nothing to change: send a name, an email or both.")
        if write(UPDATE, (changes.name, changes.email, user_id)) is None:
            abort(404, f"There is no user {user_id}.")
        return respond(b'{"message":"Updated"}')

    @app.delete("/users/<int(min=1, max=9223372036854775807):user_id>")
    def delete_user(user_id: int) -> Response:
        if write(DELETE, (user_id,)) is None:
            abort(404, f"There is no user {user_id}.")
        return respond(b'{"message":"Deleted"}')

    def write(statement: str, values: tuple[Any, ...]) -> int | None:
        """Run the statement, which commits, then delete the row's keys from Redis. Return the row's id, or None without
        a row."""
        with database() as cursor:
            try:
                cursor.execute(statement, values)
            except UniqueViolation:
                abort(409, "The email is taken by another user.")
            row = cursor.fetchone()
        if row is None:
            return None
        if CACHED:
            cache.delete(f"user:{row['id']}", PAGES)
        return int(row["id"])

    @app.errorhandler(HTTPException)
    def problem(error: HTTPException) -> Response:
        body = {"type": "about:blank", "title": error.name, "status": error.code, "detail": error.description}
        return Response(orjson.dumps(body), error.code, content_type="application/problem+json")

    return app


@contextmanager
def database() -> Iterator[RealDictCursor]:
    """Connect for one statement. It commits by itself, because a COMMIT of its own would be one more round trip."""
    with closing(psycopg2.connect(os.environ["DATABASE_URL"])) as connection:
        connection.autocommit = True
        with connection.cursor(cursor_factory=RealDictCursor) as cursor:
            yield cursor


def parse_body(kind: type[B]) -> B:
    try:
        return kind.model_validate(orjson.loads(request.get_data()))
    except orjson.JSONDecodeError:
        abort(400, "The body is not JSON.")
    except ValidationError as error:
        abort(422, "; ".join(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}" for wrong in error.errors()))


def parameter(name: str, default: int, lowest: int, highest: int) -> int:
    value = request.args.get(name, str(default))
    if not (re.fullmatch("[0-9]{1,19}", value) and lowest <= int(value) <= highest):
        abort(400, f"{name}: must be a whole number from {lowest} to {highest}")
    return int(value)


def respond(body: bytes, status: int = 200) -> Response:
    return Response(body, status, content_type="application/json")
