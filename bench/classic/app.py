"""A users service as it is usually built: cache-aside in Redis, and the keys deleted after COMMIT.

It is a peer and no straw man: the races in it are those of the design, and speed is lost nowhere on purpose.
"""

import os
import re
from typing import Annotated, Any, LiteralString, TypeVar

import orjson
from flask import Flask, Response, abort, request
from psycopg import Connection
from psycopg.errors import UniqueViolation
from psycopg.rows import DictRow, dict_row
from psycopg_pool import ConnectionPool
from pydantic import BaseModel, EmailStr, StringConstraints, ValidationError
from redis import Redis
from werkzeug.exceptions import HTTPException

B = TypeVar("B", bound=BaseModel)

TTL = 60
"""Seconds."""

PAGES = "users"
"""One hash with all pages of the list, so that a write deletes them by one name; a SCAN for them would cost more."""

PAGE = 1000

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
    database = ConnectionPool(
        os.environ["DATABASE_URL"],
        connection_class=Connection[DictRow],
        kwargs={"autocommit": True, "row_factory": dict_row},  # one statement each: a COMMIT of its own would be a trip
        min_size=1,
        max_size=8,  # one for each thread
        open=True,
    )

    @app.get("/users/<int(min=1, max=9223372036854775807):user_id>")
    def get_user(user_id: int) -> Response:
        key = f"user:{user_id}"
        body: Any = cache.get(key)
        if body is None:
            with database.connection() as connection:
                row = connection.execute(SELECT_ONE, (user_id,)).fetchone()
            if row is None:
                abort(404, f"There is no user {user_id}.")
            body = orjson.dumps(row)
            cache.setex(key, TTL, body)
        return answer(body)

    @app.get("/users")
    def list_users() -> Response:
        after, limit = parameter("cursor", 0, 0, 2**63 - 1), parameter("limit", PAGE, 1, PAGE)
        page = f"{after}:{limit}"
        kept: Any = cache.hget(PAGES, page)
        if kept is None:
            with database.connection() as connection:
                rows = connection.execute(SELECT_PAGE, (after, limit + 1)).fetchall()
            link = f'</users?cursor={rows[limit - 1]["id"]}&limit={limit}>; rel="next"' if len(rows) > limit else ""
            kept = link.encode() + b"\n" + orjson.dumps(rows[:limit])
            with cache.pipeline() as fill:
                fill.hset(PAGES, page, kept)
                fill.expire(PAGES, TTL, nx=True)  # a page that is added later makes the others live no longer
                fill.execute()
        link, _, body = kept.partition(b"\n")
        response = answer(body)
        if link:
            response.headers["Link"] = link.decode()
        return response

    @app.post("/users")
    def create_user() -> Response:
        user = given(NewUser)
        user_id = write(INSERT, (user.name, user.email))
        response = answer(orjson.dumps({"id": user_id, "message": "Created"}), 201)
        response.headers["Location"] = f"/users/{user_id}"
        return response

    @app.put("/users/<int(min=1, max=9223372036854775807):user_id>")
    def update_user(user_id: int) -> Response:
        changes = given(Changes)
        if changes.name is None and changes.email is None:
            abort(422, "Nothing to change: give a name, an email or both.")
        if write(UPDATE, (changes.name, changes.email, user_id)) is None:
            abort(404, f"There is no user {user_id}.")
        return answer(b'{"message":"Updated"}')

    @app.delete("/users/<int(min=1, max=9223372036854775807):user_id>")
    def delete_user(user_id: int) -> Response:
        if write(DELETE, (user_id,)) is None:
            abort(404, f"There is no user {user_id}.")
        return answer(b'{"message":"Deleted"}')

    def write(statement: LiteralString, values: tuple[Any, ...]) -> int | None:
        """The id of the row that there was to write; then it is committed, and after that deleted from Redis."""
        with database.connection() as connection:
            try:
                row = connection.execute(statement, values).fetchone()
            except UniqueViolation:
                abort(409, "The email is taken by another user.")
        if row is None:
            return None
        cache.delete(f"user:{row['id']}", PAGES)
        return int(row["id"])

    @app.errorhandler(HTTPException)
    def problem(error: HTTPException) -> Response:
        body = {"type": "about:blank", "title": error.name, "status": error.code, "detail": error.description}
        return Response(orjson.dumps(body), error.code, content_type="application/problem+json")

    return app


def given(kind: type[B]) -> B:
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


def answer(body: bytes, status: int = 200) -> Response:
    return Response(body, status, content_type="application/json")
