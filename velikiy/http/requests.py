"""What a client sends, read strictly: each refusal says which field or header it is about, and why."""

import re
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import jiter
import orjson
from flask import request
from gunicorn.http.errors import ParseException
from pydantic import BaseModel, ValidationError
from werkzeug.datastructures import ETags

from velikiy.coherence import NOT_TRIED, Entry, Lease, NotTried, deadline
from velikiy.http.problems import Problem
from velikiy.resources.base import Resource
from velikiy.resources.pagination import LIMIT, Page
from velikiy.resources.repository import Condition

B = TypeVar("B", bound=BaseModel)

MAX_BODY = 64 * 1024
"""Bytes; the largest valid user has under 2 kB. The edge refuses the same, earlier (client_max_body_size)."""

MAX_BATCH = 2 * 1024 * 1024
"""Bytes of the body of a batch."""

JSON = ("application/json",)
MERGE_PATCH = ("application/json", "application/merge-patch+json")
"""RFC 7396. PUT means the same here: what is absent stays."""

Q = 100
"""Characters of a search."""

WORDS = 8
"""Of a search: each costs PostgreSQL a look at each row."""

MOST = 1000
"""Errors that one answer names."""

KEY = r"[!-+\--~]{1,255}"
"""An Idempotency-Key; without a comma: of two such headers servers make one."""

TAG = '(W/)?"[!#-~]*"'
TAGS = rf"[ \t,]*{TAG}([ \t]*,[ \t,]*{TAG})*[ \t,]*"
"""If-Match and If-None-Match of a write (RFC 9110, 8.8.3), besides `*`. Anything else is refused: a condition that
nobody understands must pass neither for one that holds nor for one that does not."""


QUOTED = re.compile(r'"(?:\\.|[^"\\])*+("|\\?$)')
REFUSED = re.compile(r"q[ \t]*=[ \t]*(0+(\.0*)?|\.0+)")
"""A parameter of Accept that refuses its range. A weight that cannot be read refuses nothing."""


class Key(NamedTuple):
    """A request that may be sent more than once, and is to be done once."""

    name: str
    """As the client chose it: the header `Idempotency-Key`."""

    request: bytes
    """What came with it: method, path and body, where spaces and the order of keys make no difference."""


# ---- the address ----


def parameters(*known: str) -> dict[str, str]:
    """The query's parameters, each known and given once."""
    query = request.query_string.decode("latin-1")
    if not query:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="surrogateescape", max_num_fields=50)
    except ValueError:
        raise Problem("bad-request", "The query has more than 50 parameters.") from None
    given: dict[str, str] = {}
    for name, value in pairs:
        if name not in known:
            expected = "its parameters are " + ", ".join(known) if known else "it has no parameters"
            raise bad(
                _shown(name) or "a parameter without a name",
                f"is not a parameter of {request.path}; {expected}",
            )
        if name in given:
            raise bad(name, "is given more than once")
        if _shown(value) != value:
            raise bad(name, "must be percent-encoded UTF-8")
        given[name] = value
    # Known names have no % in them: what is left to be half an encoding belongs to a value.
    if half := re.search("(?:^|&)([^&=]*)=[^&]*?(?:%(?![0-9A-Fa-f]{2})|[^!-~])", query):
        raise bad(half[1], "must be percent-encoded UTF-8")
    return given


def _shown(text: str) -> str:
    """Bytes that are no UTF-8 have become halves of surrogate pairs, which no answer can hold."""
    return text.encode("utf-8", "replace").decode()


def page(resource: Resource) -> Page:
    searched = ("q",) if resource.words else ()
    given = parameters("cursor", "limit", *searched, "sort")
    limit = given.get("limit", str(LIMIT))
    if not (re.fullmatch("[1-9][0-9]{0,3}", limit) and int(limit) <= LIMIT):
        raise bad("limit", f"must be a whole number from 1 to {LIMIT}")
    sort = given.get("sort", "id")
    if sort.removeprefix("-") not in ("id", *resource.sorts):
        names = ", ".join(["id", *resource.sorts])
        raise bad("sort", f"must be one of {names}; a - before the name reverses the order")
    cursor = given.get("cursor", "")
    if "cursor" in given and not cursor:
        raise bad_cursor()
    return Page(int(limit), sort, words(given), cursor)


def words(given: dict[str, str]) -> str:
    """The parameter `q`, in one spelling: the order of words makes no difference."""
    if "q" not in given:
        return ""
    q = given["q"]
    if re.search(r"[\x00-\x1f\x7f-\x9f]", q):
        raise bad("q", "must not contain control characters")
    if not q.strip() or len(q) > Q:
        raise bad("q", f"must have 1 to {Q} characters and at least one word; yours has {len(q)} characters")
    words = q.split()
    if len(words) > WORDS:
        raise bad("q", f"must have at most {WORDS} words; yours has {len(words)}")
    return " ".join(sorted(set(words)))


def bad(name: str, detail: str) -> Problem:
    return Problem("bad-request", f"{name}: {detail}", [{"field": name, "detail": detail}])


def bad_cursor() -> Problem:
    return bad("cursor", "is not valid for this order; take the address of the next page from the Link header")


def asked() -> Lease | NotTried | None:
    """What an edge that has asked Redis already says of it (edge/lua/redis.lua); it passes no client's header of this
    name on. A lease that somebody else makes up is none, and fills nothing."""
    said = request.headers.get("Fill-Lease")
    if not said:
        return NOT_TRIED
    return None if said == "-" else Lease(said)


def until() -> float | None:
    """Return the moment after which this write must not be committed, None where the sender waits for ever."""
    header = request.headers.get("Write-Deadline")
    return deadline.parse(header, request.environ.get("gunicorn.socket")) if header else None


# ---- what it takes ----


def takes_json(accept: str) -> bool:
    """Tell whether an answer in JSON will do (RFC 9110, 12.5.1): the most specific of the ranges that fit decides. A
    client that takes problems alone gets other answers too, unless it refuses application/json by name. The edge says
    yes to fewer headers (edge/nginx.conf, $takes_json)."""
    ranges: dict[str, bool] = {}
    for member in QUOTED.sub('""', accept).lower().split(","):
        name, *parameters = (part.strip(" \t") for part in member.split(";"))
        wanted = not any(REFUSED.fullmatch(parameter) for parameter in parameters)
        if name:
            ranges[name] = wanted or ranges.get(name, False)

    def takes(kind: str) -> bool:
        # Java's own client has "*" among others, and means all.
        return next((ranges[name] for name in (kind, "application/*", "*/*", "*") if name in ranges), not ranges)

    return takes("application/json") or ("application/json" not in ranges and takes("application/problem+json"))


# ---- the body ----


def body(kind: type[B], types: tuple[str, ...] = JSON, limit: int = MAX_BODY) -> B:
    """Raises: Problem"""
    sent = _sent(limit)
    if not sent.strip():
        raise Problem("not-json", "The body is empty. Send a JSON object.")
    _check_type(types)
    try:
        jiter.from_json(sent, catch_duplicate_keys=True, allow_inf_nan=False)
    except ValueError as error:
        raise Problem("not-json", f"The body is not JSON: {error}.") from None
    try:
        return kind.model_validate_json(sent)
    except ValidationError as error:
        problems = errors_of(error)
        detail = "; ".join(f"{problem['field']}: {problem['detail']}" for problem in problems[:10])
        raise Problem("invalid", detail, problems) from None


def _sent(limit: int) -> bytes:
    """All of it or nothing: a server hands over what came of a body that was cut off, and the framework what fits of
    one in chunks that is too large."""
    length = request.content_length
    try:
        sent = request.stream.read(limit + 1) if length is None or length <= limit else b""
    except (ParseException, OSError):  # the second: the connection ended before the body
        raise Problem("bad-request", "The chunked body is malformed or was cut off. Send it again.") from None
    if len(sent) > limit or (length or 0) > limit:
        raise Problem(
            "content-too-large", f"The body is larger than {limit} bytes. Split the request into smaller requests."
        )
    if length is not None and len(sent) < length:
        raise Problem("bad-request", f"The body was cut off: {len(sent)} of {length} bytes arrived. Send it again.")
    return sent


def _check_type(types: tuple[str, ...]) -> None:
    """JSON has to say that it is. What says nothing, or that it is a form, any page in a browser can send."""
    if request.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
        detail = "The body must not be compressed: send it without Content-Encoding."
        raise Problem("unsupported-media-type", detail, headers={"Accept-Encoding": "identity"})
    charset = request.mimetype_params.get("charset", "utf-8").lower()
    if request.mimetype not in types or charset not in ("utf-8", "utf8"):
        detail = f"The body must be JSON in UTF-8: send Content-Type: {' or '.join(types)}."
        headers = {"Accept-Patch": ", ".join(types)} if request.method == "PATCH" else {"Accept": ", ".join(types)}
        raise Problem("unsupported-media-type", detail, headers=headers)


SENTENCES = {
    "missing": "is required",
    "extra_forbidden": "is not a known field",
    "string_type": "must be a string",
    "string_unicode": "contains an unpaired surrogate",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
    "list_type": "must be an array",
    "too_short": "must have at least {min_length} items; yours has {actual_length}",
    "too_long": "must have at most {max_length} items",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "decimal_type": "must be a number",
    "decimal_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "union_tag_not_found": "is required: create, update or delete",
    "union_tag_invalid": "must be create, update or delete",
}
"""By pydantic's name of what is wrong. Its own sentences speak of its inner life."""


def errors_of(error: ValidationError) -> list[dict[str, str]]:
    """`{"field": "email", "detail": "is required"}` for each field that cannot be taken."""
    problems = error.errors(include_url=False, include_input=False)[:MOST]
    return [_field(problem) for problem in problems]


def _field(problem: Any) -> dict[str, str]:
    place = [str(part) for part in problem["loc"]]
    if place[:1] == ["operations"]:
        del place[2:3]  # the name of the kind of operation, which is not in the body
    context = problem.get("ctx", {})
    if problem["type"].startswith("union_tag_"):
        place.append(context["discriminator"].strip("'"))
    field = ".".join(place) or "body"
    if problem["type"] == "value_error":
        return {"field": field, "detail": str(context["error"])}
    sentence = SENTENCES.get(problem["type"])
    return {"field": field, "detail": sentence.format_map(context) if sentence else problem["msg"]}


# ---- conditions (RFC 9110, section 13) ----


def condition() -> Condition | None:
    """Of a write, by its If-Match or If-None-Match."""
    if "If-Unmodified-Since" in request.headers:
        raise bad(
            "If-Unmodified-Since", "is not supported: two writes may fall within one second. Send If-Match instead"
        )
    match, none_match = _tags("If-Match", request.if_match), _tags("If-None-Match", request.if_none_match)
    if match is None and none_match is None:
        return None

    def may(entry: Entry) -> bool:
        tag = entry.etag.strip('"')
        if match is not None and not (match.star_tag or tag in match):
            return False
        return none_match is None or not (none_match.star_tag or none_match.contains_weak(tag))

    return may


def _tags(name: str, tags: ETags) -> ETags | None:
    if name not in request.headers:
        return None
    # The framework takes what has no quotes for an ETag as well.
    if not re.fullmatch(rf"\*|{TAGS}", request.headers[name]):
        raise bad(name, 'must be * or a list of ETags with their quotes: "..."')
    return tags


def key(sent: BaseModel) -> Key | None:
    """The header `Idempotency-Key` (IETF draft of that name), with what it belongs to."""
    name = request.headers.get("Idempotency-Key")
    if name is None:
        return None
    if not re.fullmatch(KEY, name):
        raise bad(
            "Idempotency-Key",
            "must be a single key of 1 to 255 visible ASCII characters without a comma, such as a UUID",
        )
    content = orjson.dumps(sent.model_dump(mode="json", exclude_unset=True), option=orjson.OPT_SORT_KEYS)
    return Key(name, b"%b %b %b" % (request.method.encode(), request.path.encode(), content))
