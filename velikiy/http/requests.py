"""Parse requests strictly: each refusal names the field, parameter or header, and the reason."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import jiter
import orjson
from flask import g, request
from gunicorn.http.errors import ParseException
from pydantic import BaseModel, ValidationError

from velikiy.coherence import NOT_TRIED, FillLease, NotTried
from velikiy.coherence.deadline import Deadline, deadline_of
from velikiy.resources.base import Body, Resource
from velikiy.resources.idempotency import Key
from velikiy.resources.pagination import MAX_PAGE_ROWS, Page
from velikiy.resources.problems import Problem
from velikiy.resources.validation import errors_of
from velikiy.resources.work_limit import Work, bounded

B = TypeVar("B", bound=BaseModel)

MAX_BODY_BYTES = 64 * 1024
"""The largest valid user has less than 2 kB. The edge refuses larger bodies earlier (client_max_body_size)."""

MAX_BATCH_BYTES = 2 * 1024 * 1024

JSON = ("application/json",)
MERGE_PATCH = ("application/json", "application/merge-patch+json")
"""RFC 7396. PUT means the same here: an absent field keeps its value."""

MAX_SEARCH_CHARACTERS = 100

MAX_SEARCH_WORDS = 8
"""PostgreSQL compares each word with each candidate row."""

IDEMPOTENCY_KEY = r"[!-+\--~]{1,255}"
"""The characters of an Idempotency-Key. A comma is refused, because servers join two headers of one name with it."""

CLIENT_DIGEST = "[0-9a-f]{32}"
"""The digest of a client's address, from an edge (edge/lua/write.lua). The address itself is not stored."""

QUOTED = re.compile(r'"(?:\\.|[^"\\])*+("|\\?$)')
ZERO_WEIGHT = re.compile(r"q[ \t]*=[ \t]*(0+(\.0*)?|\.0+)")
"""A parameter of Accept that refuses its media range. A malformed weight refuses nothing."""


# ---- the query ----


def parameters(*known: str) -> dict[str, str]:
    """Return the parameters of the query.

    Raises:
        Problem: A parameter is unknown, repeated or malformed.
    """
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
            expected = "its parameters are " + ", ".join(sorted(known)) if known else "it has no parameters"
            raise bad(
                _printable(name) or "a parameter without a name",
                f"is not a parameter of {request.path}; {expected}",
            )
        if name in given:
            raise bad(name, "is given more than once")
        if _printable(value) != value:
            raise bad(name, "must be percent-encoded UTF-8")
        given[name] = value
    # Known names contain no %, so a malformed encoding belongs to a value.
    if half := re.search("(?:^|&)([^&=]*)=[^&]*?(?:%(?![0-9A-Fa-f]{2})|[^!-~])", query):
        raise bad(half[1], "must be percent-encoded UTF-8")
    return given


def _printable(text: str) -> str:
    """Replace lone surrogates, which stand for bytes that are not UTF-8 and cannot be sent."""
    return text.encode("utf-8", "replace").decode()


def page(resource: Resource) -> Page:
    """Parse the parameters of a list.

    Raises:
        Problem
    """
    given = parameters("cursor", "limit", "sort", *_search_parameters(resource))
    limit, cursor = _limit_and_cursor(given)
    return Page(limit, _sort(resource, given), _words(given), cursor, _filters(resource, given))


def export(resource: Resource) -> Page:
    """Parse the parameters of an export: the rows of a search, and their order.

    Raises:
        Problem
    """
    given = parameters("sort", *_search_parameters(resource))
    return Page(sort=_sort(resource, given), q=_words(given), filters=_filters(resource, given))


def history_page() -> Page:
    """Parse the parameters of a history.

    Raises:
        Problem
    """
    limit, cursor = _limit_and_cursor(parameters("cursor", "limit"))
    return Page(limit, cursor=cursor)


def _limit_and_cursor(given: Mapping[str, str]) -> tuple[int, str]:
    """Raises: Problem"""
    limit = given.get("limit", str(MAX_PAGE_ROWS))
    if not (re.fullmatch("[1-9][0-9]{0,3}", limit) and int(limit) <= MAX_PAGE_ROWS):
        raise bad("limit", f"must be a whole number from 1 to {MAX_PAGE_ROWS}")
    if given.get("cursor") == "":
        raise bad_cursor()
    return int(limit), given.get("cursor", "")


def search(resource: Resource) -> Page:
    """Parse the parameters of a count, which choose rows and no page.

    Raises:
        Problem
    """
    given = parameters(*_search_parameters(resource))
    return Page(q=_words(given), filters=_filters(resource, given))


def _sort(resource: Resource, given: Mapping[str, str]) -> str:
    """Raises: Problem"""
    sort = given.get("sort", "id")
    if sort.removeprefix("-") not in ("id", *resource.sort_keys):
        names = ", ".join(["id", *resource.sort_keys])
        raise bad("sort", f"must be one of {names}; a - before the name reverses the order")
    return sort


def _search_parameters(resource: Resource) -> list[str]:
    return [*(["q"] if resource.search_column else []), *resource.filters]


def _filters(resource: Resource, given: dict[str, str]) -> dict[str, str]:
    chosen = {name: wanted for name, wanted in resource.filters.items() if name in given}
    for name, wanted in chosen.items():
        if not re.fullmatch(wanted.pattern, given[name]):
            raise bad(name, wanted.rule)
    return {name: wanted.normalize(given[name]) for name, wanted in chosen.items()}


def _words(given: dict[str, str]) -> str:
    """Return the parameter `q` in one spelling: the order of words makes no difference."""
    if "q" not in given:
        return ""
    q = given["q"]
    if re.search(r"[\x00-\x1f\x7f-\x9f]", q):
        raise bad("q", "must not contain control characters")
    if not q.strip() or len(q) > MAX_SEARCH_CHARACTERS:
        raise bad(
            "q",
            f"must have 1 to {MAX_SEARCH_CHARACTERS} characters and at least one word; yours has {len(q)} characters",
        )
    words = q.split()
    if len(words) > MAX_SEARCH_WORDS:
        raise bad("q", f"must have at most {MAX_SEARCH_WORDS} words; yours has {len(words)}")
    return " ".join(sorted(set(words)))


def bad(name: str, detail: str) -> Problem:
    return Problem("bad-request", f"{name}: {detail}", [{"field": name, "detail": detail}])


def bad_cursor() -> Problem:
    return bad("cursor", "is not valid for this order; take the address of the next page from the Link header")


def from_edge() -> FillLease | NotTried | None:
    """Return the result of the edge's own read of Redis (edge/lua/redis.lua), for `Gate.read`.

    A client cannot set this header, because the edge does not forward it. A made-up fill lease would fill nothing.
    """
    header = request.headers.get("Fill-Lease")
    if not header:
        return NOT_TRIED
    return None if header == "-" else FillLease(header)


def deadline(timeout: float) -> Deadline:
    """Return the moment after which this write must not be committed. `timeout`: DATABASE_TIMEOUT."""
    return deadline_of(request.headers.get("Write-Deadline"), request.environ.get("gunicorn.socket"), timeout)


def author() -> str:
    """Return the author of this request's write, for `Gate.write`; empty for a client without an API key."""
    key = g.get("api_key")
    return f"api:{key.name}" if key else ""


# ---- Accept ----


def takes_json(accept: str) -> bool:
    """Return whether the client accepts JSON (RFC 9110, 12.5.1): the most specific media range that matches decides.

    A client that accepts only problems receives other JSON too, unless it refuses application/json by name. The edge
    serves its cache to a plainer set of headers (edge/conf/routing.conf, $takes_json).
    """
    ranges: dict[str, bool] = {}
    for member in QUOTED.sub('""', accept).lower().split(","):
        name, *parameters = (part.strip(" \t") for part in member.split(";"))
        wanted = not any(ZERO_WEIGHT.fullmatch(parameter) for parameter in parameters)
        if name:
            ranges[name] = wanted or ranges.get(name, False)

    def takes(kind: str) -> bool:
        # Java's own client sends "*" among other ranges, and means all. "*/json" is no media range, but its meaning is
        # clear.
        return next(
            (ranges[name] for name in (kind, "application/*", "*/json", "*/*", "*") if name in ranges), not ranges
        )

    return takes("application/json") or ("application/json" not in ranges and takes("application/problem+json"))


# ---- the body ----


def body(model: type[B], types: tuple[str, ...] = JSON, limit: int = MAX_BODY_BYTES) -> B:
    """Parse the body as this model.

    Raises:
        Problem
    """
    content, _ = _json(types, limit)
    with bounded() as work:
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            raise _invalid(error, work) from None


def changes(resource: Resource, types: tuple[str, ...], stored: Callable[[], Mapping[str, Any] | None]) -> Body:
    """Parse the body as changes of a row. A field that equals the stored value is no change, even if today's rules
    refuse the value: the row may come from SQL, or from a table that was adopted.

    Args:
        stored: Returns the members of the row, or None if it does not exist. It is called only for invalid fields.

    Raises:
        Problem
    """
    content, members = _json(types, MAX_BODY_BYTES)
    with bounded() as work:
        try:
            return resource.update_model.model_validate_json(content)
        except ValidationError as error:
            invalid = {str(details["loc"][0]) if details["loc"] else "" for details in error.errors()}
            if not (isinstance(members, dict) and invalid <= set(resource.fields)):
                raise _invalid(error, work) from None
            row = stored()
            if row is None or not all(_is_same(members[field], row[field]) for field in invalid):
                raise _invalid(error, work) from None
        changed = {name: members[name] for name in resource.fields if name in members and name not in invalid}
        if not changed:
            return resource.update_model.model_construct()  # no field changes, and the write counts all the same
        try:
            return resource.update_model.model_validate_json(orjson.dumps(changed))
        except ValidationError as error:
            raise _invalid(error, work) from None


def complete(resource: Resource, changes: Body) -> Body:
    """Return the changes as the fields of a new row.

    Raises:
        Problem: A field is missing.
    """
    with bounded() as work:
        try:
            return resource.create_model.model_validate_json(changes.model_dump_json(exclude_unset=True))
        except ValidationError as error:
            raise _invalid(error, work) from None


def _is_same(sent: Any, stored: Any) -> bool:
    """Compare as JSON: to Python, false equals 0."""
    try:
        return orjson.dumps(sent) == orjson.dumps(stored)
    except TypeError:  # an integer beyond 64 bits, which no row contains
        return False


def _json(types: tuple[str, ...], limit: int) -> tuple[bytes, Any]:
    """Return the body as bytes and as the value that they contain.

    Raises:
        Problem
    """
    content = _read(limit)
    if not content.strip():
        raise Problem("not-json", "The body is empty. Send a JSON object.")
    _check_type(types, "JSON in UTF-8")
    try:
        return content, jiter.from_json(content, catch_duplicate_keys=True, allow_inf_nan=False)
    except ValueError as error:
        raise Problem("not-json", f"The body is not JSON: {error}.") from None


def content(types: tuple[str, ...], limit: int) -> bytes:
    """Return the body as it was sent.

    Raises:
        Problem
    """
    sent = _read(limit)
    _check_type(types, "the options and the bytes of a file")
    return sent


def _invalid(error: ValidationError, work: Work) -> Problem:
    errors = errors_of(error)
    detail = "; ".join(f"{error['field']}: {error['detail']}" for error in errors[:10])
    if not_listed := error.error_count() - len(errors) + work.not_listed:
        detail += f"; `errors` lists the first {len(errors)} errors, and {not_listed} more are not listed"
    return Problem("invalid", detail, errors)


def _read(limit: int) -> bytes:
    """Read the whole body or raise. gunicorn returns the beginning of a body that was cut off, and Flask the beginning
    of a chunked body that is too large."""
    length = request.content_length
    try:
        content = request.stream.read(limit + 1) if length is None or length <= limit else b""
    except (ParseException, OSError):  # the second: the connection ended before the body
        raise Problem("bad-request", "The chunked body is malformed or was cut off. Send it again.") from None
    if len(content) > limit or (length or 0) > limit:
        raise Problem(
            "content-too-large", f"The body is larger than {limit} bytes. Split the request into smaller requests."
        )
    if length is not None and len(content) < length:
        raise Problem("bad-request", f"The body was cut off: {len(content)} of {length} bytes arrived. Send it again.")
    return content


def _check_type(types: tuple[str, ...], kind: str) -> None:
    """Require a media type: any web page can send a body that has no type or is a form."""
    if request.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
        detail = "The body must not be compressed: send it without Content-Encoding."
        raise Problem("unsupported-media-type", detail, headers={"Accept-Encoding": "identity"})
    charset = request.mimetype_params.get("charset", "utf-8").lower()
    if request.mimetype not in types or charset not in ("utf-8", "utf8"):
        detail = f"The body must be {kind}: send Content-Type: {' or '.join(types)}."
        headers = {"Accept-Patch": ", ".join(types)} if request.method == "PATCH" else {"Accept": ", ".join(types)}
        raise Problem("unsupported-media-type", detail, headers=headers)


# ---- Prefer ----

PREFERENCE = re.compile(r'(?:"(?:\\.|[^"\\])*+"|[^",])+')
RETURN = re.compile(r'return[ \t]*=[ \t]*("?)(representation|minimal)\1[ \t]*(;|$)', re.IGNORECASE)


def preference() -> str:
    """Return what the response to a write shall contain (RFC 7240): `representation`, `minimal`, or empty without a
    preference. The first one counts, and a server ignores others that it does not know."""
    for member in PREFERENCE.findall(request.headers.get("Prefer", "")):
        if found := RETURN.match(member.strip(" \t")):
            return found[2].lower()
    return ""


# ---- idempotency ----


def idempotency_key(body: BaseModel, attached: bytes = b"") -> Key | None:
    """Return the header `Idempotency-Key` (IETF draft of that name) with the request that it belongs to.

    `attached`: what follows `body` in the request.
    """
    name = request.headers.get("Idempotency-Key")
    if name is None:
        return None
    if not re.fullmatch(IDEMPOTENCY_KEY, name):
        raise bad(
            "Idempotency-Key",
            "must be a single key of 1 to 255 visible ASCII characters without a comma, such as a UUID",
        )
    owner = _unkeyed_client()
    if key := g.get("api_key"):  # two clients may choose one name; a rotated API key still has its retries
        owner, name = key.name, f"{key.name} {name}"
    content = orjson.dumps(body.model_dump(mode="json", exclude_unset=True), option=orjson.OPT_SORT_KEYS)
    return Key(name, owner, b"%b %b %b%b" % (request.method.encode(), request.path.encode(), content, attached))


def _unkeyed_client() -> str:
    """Return the owner of the idempotency keys of a client without an API key.

    The address counts for the quota only, and does not belong to the name: a client that has changed its network still
    gets the response to its first try (docs/decisions/0120-owners-of-idempotency-keys.md).
    """
    digest = request.headers.get("Client-Digest", "")
    return f"~{digest}" if re.fullmatch(CLIENT_DIGEST, digest) else ""
