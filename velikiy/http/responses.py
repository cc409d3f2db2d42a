"""What the service sends."""

from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from flask import Response, g, request

from velikiy.coherence import Answer
from velikiy.http.problems import PROBLEM, Problem
from velikiy.resources.base import Resource
from velikiy.resources.repository import Missing, Refusal, Taken, missing


@dataclass(frozen=True)
class Sent:
    """The answer to a write; unlike a response it can be kept."""

    status: int
    members: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    """The kind of it, where it is one."""

    @classmethod
    def of(cls, kept: dict[str, Any]) -> "Sent":
        return cls(**kept)

    @classmethod
    def refused(cls, problem: Problem) -> "Sent":
        return cls(problem.status, {"detail": problem.detail, "errors": problem.errors}, problem.headers, problem.kind)

    def kept(self) -> dict[str, Any]:
        return {"status": self.status, "members": self.members, "headers": self.headers, "problem": self.problem}

    def again(self) -> "Sent":
        return replace(self, headers={**self.headers, "Idempotency-Replayed": "true"})

    def response(self) -> Response:
        if self.problem:
            return Problem(self.problem, **self.members, headers=self.headers).response()
        return Response(orjson.dumps(self.members), self.status, self.headers, content_type="application/json")


def answer(read: Answer) -> Response:
    """What was read; 304 where the client has it (RFC 9110, 13.1.2).

    If-Modified-Since is not looked at: a date has whole seconds, and of two writes in one the second would be hidden.
    """
    entry = read.entry
    if entry.status == 404:
        body = b'%s,"request_id":"%s"}' % (entry.body[:-1], g.request_id.encode())
        response = Response(body, 404, content_type=PROBLEM)
    else:
        response = Response(entry.body, entry.status, content_type="application/json")
    for name, value in (("ETag", entry.etag), ("Last-Modified", entry.modified), ("Link", entry.link)):
        if value:
            response.headers.add(name, value)
    tags = request.if_none_match
    if entry.etag and (tags.star_tag or tags.contains_weak(entry.etag.strip('"'))):
        response.status_code = 304
        response.set_data(b"")
    # What the caches in front need to know of an answer that came through the fence.
    response.headers.add("Cache-Status", read.cache_status)
    if not read.storable:
        response.headers.add("X-Accel-Expires", "0")
    return response


def refused(resource: Resource, refusal: Refusal) -> Problem:
    match refusal:
        case Missing(number=number):
            return missing(resource, number)
        case Taken(field=field):
            detail = f"is taken by another {resource.one}"
            return Problem("taken", f"{field}: {detail}", [{"field": field, "detail": detail}])
        case _:
            return Problem(
                "precondition-failed",
                (
                    f"The {resource.one} does not meet the condition in If-Match or If-None-Match."
                    " Fetch it again and retry with its new ETag."
                ),
            )
