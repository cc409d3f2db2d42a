"""HTTP only: read the request, call users, say what came of it."""

import re
import time
from typing import Any, TypeVar

import orjson
import structlog
from flask import Blueprint, Flask, Response, g, request
from pydantic import BaseModel, ValidationError
from werkzeug.routing import BaseConverter
from werkzeug.routing import ValidationError as NoMatch

from velikiy.coherence import Answer
from velikiy.problems import Problem
from velikiy.users import PAGE, BadCursor, Changes, EmailTaken, NewUser, Users

log = structlog.get_logger()
B = TypeVar("B", bound=BaseModel)

MAX_BODY = 64 * 1024
"""Bytes; the largest valid user has under 2 kB. The edge refuses the same, earlier (client_max_body_size)."""


class IdConverter(BaseConverter):
    """An id in its one spelling: Flask's own `int` takes 007 and ٧ for 7, each a cache entry of its own."""

    regex = "[1-9][0-9]{0,18}"

    def to_python(self, value: str) -> int:
        number = int(value)
        if number >= 2**63:
            raise NoMatch
        return number


def install(app: Flask, users: Users) -> None:
    app.url_map.converters["id"] = IdConverter
    app.url_map.merge_slashes = False
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.before_request(_begin)
    app.before_request(_one_spelling)
    app.after_request(_finish)
    app.teardown_request(_end)
    app.register_blueprint(_routes(users))


def _routes(users: Users) -> Blueprint:
    routes = Blueprint("users", __name__)

    @routes.get("/users")
    def list_users() -> Response:
        parameters = _parameters("cursor", "limit")
        limit = _limit(parameters.get("limit"))
        try:
            return _answer(users.page(parameters.get("cursor"), limit))
        except BadCursor:
            raise _bad("cursor", "is not one that this service made; follow the Link header of a page") from None

    @routes.get("/users/<id:user_id>")
    def get_user(user_id: int) -> Response:
        _parameters()
        answer = users.get(user_id)
        if answer.entry.status == 404:
            return _tiered(_no_user(user_id).response(), answer)
        return _answer(answer)

    @routes.post("/users")
    def create_user() -> Response:
        _parameters()
        body = _body(NewUser)
        try:
            user_id = users.create(body)
        except EmailTaken:
            raise _email_taken() from None
        response = _json({"id": user_id, "message": "Created"}, 201)
        response.headers["Location"] = f"/users/{user_id}"
        return response

    @routes.put("/users/<id:user_id>")
    def update_user(user_id: int) -> Response:
        _parameters()
        body = _body(Changes)
        try:
            found = users.update(user_id, body)
        except EmailTaken:
            raise _email_taken() from None
        if not found:
            raise _no_user(user_id)
        return _json({"message": "Updated"})

    @routes.delete("/users/<id:user_id>")
    def delete_user(user_id: int) -> Response:
        _parameters()
        if not users.delete(user_id):
            raise _no_user(user_id)
        return _json({"message": "Deleted"})

    return routes


# ---- what comes in ----


def _begin() -> None:
    g.began = time.monotonic()
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request.headers.get("X-Request-Id", "-"))


def _end(_: BaseException | None) -> None:
    structlog.contextvars.clear_contextvars()


def _one_spelling() -> None:
    """No route needs percent-encoding, so an encoded path is another spelling of one that has its own."""
    raw = request.environ.get("RAW_URI") or request.environ.get("REQUEST_URI") or request.path
    if raw.partition("?")[0] != request.path:
        raise Problem(404, "There is nothing at this address. Paths are spelled without percent-encoding.")


def _parameters(*known: str) -> dict[str, str]:
    """The query's parameters, each known and given once."""
    for name in request.args:
        if name not in known:
            expected = "it takes " + " and ".join(known) if known else "it takes none"
            raise _bad(name, f"is not a parameter of {request.path}; {expected}")
        if len(request.args.getlist(name)) > 1:
            raise _bad(name, "is given more than once")
    return request.args.to_dict()


def _limit(value: str | None) -> int:
    if value is None:
        return PAGE
    if not (re.fullmatch("[1-9][0-9]{0,3}", value) and int(value) <= PAGE):
        raise _bad("limit", f"must be a whole number from 1 to {PAGE}")
    return int(value)


def _body(kind: type[B]) -> B:
    try:
        data = orjson.loads(request.get_data())
    except orjson.JSONDecodeError as error:
        raise Problem(400, f"The body is not JSON: {error}") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = [_field(problem) for problem in error.errors(include_url=False)]
        detail = "; ".join(f"{problem['field']}: {problem['detail']}" for problem in problems)
        raise Problem(422, detail, problems) from None


SENTENCES = {
    "missing": "is required",
    "extra_forbidden": "is not a field of a user",
    "string_type": "must be a string",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
}


def _field(problem: Any) -> dict[str, str]:
    field = ".".join(str(part) for part in problem["loc"]) or "body"
    if problem["type"] == "value_error":
        return {"field": field, "detail": str(problem["ctx"]["error"])}
    return {"field": field, "detail": SENTENCES.get(problem["type"], problem["msg"])}


# ---- what goes out ----


def _answer(answer: Answer) -> Response:
    response = Response(answer.entry.body, answer.entry.status, content_type="application/json")
    if answer.entry.link:
        response.headers["Link"] = answer.entry.link
    return _tiered(response, answer)


def _tiered(response: Response, answer: Answer) -> Response:
    response.headers["Cache-Status"] = answer.cache_status
    if not answer.storable:
        response.headers["X-Accel-Expires"] = "0"
    return response


def _json(members: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(members), status, content_type="application/json")


def _bad(name: str, detail: str) -> Problem:
    return Problem(400, f"{name}: {detail}", [{"field": name, "detail": detail}])


def _no_user(user_id: int) -> Problem:
    return Problem(404, f"There is no user {user_id}.")


def _email_taken() -> Problem:
    detail = "is taken by another user (compared case-insensitively)"
    return Problem(409, f"email: {detail}", [{"field": "email", "detail": detail}])


def _finish(response: Response) -> Response:
    # Caches behind ours (browsers, CDNs) cannot be told of a write: they must ask each time.
    response.headers.setdefault("Cache-Control", "private, no-cache")
    response.headers["X-Content-Type-Options"] = "nosniff"
    # The route and not the path: a mistyped address may hold somebody's e-mail.
    # Edges and containers' health checks ask every second; nobody wants to read that.
    say = log.debug if request.path.startswith(("/livez", "/readyz", "/.lease/")) else log.info
    say(
        "request",
        method=request.method,
        route=request.url_rule.rule if request.url_rule else None,
        status=response.status_code,
        milliseconds=round((time.monotonic() - g.began) * 1000, 1),
    )
    return response
