"""Preconditions of a write: If-Match and If-None-Match (RFC 9110, section 13).

A server that compresses a response changes its ETag: Nginx and most proxies make it weak (`W/"..."`), others append the
name of the encoding (`"...-gzip"`). The digest inside still names the content that the client has read, so both tags
match here. To compare them strongly, as the RFC has it for tags in general, would answer 412 to every retry.
"""

import re

from flask import request
from werkzeug.datastructures import ETags

from velikiy.coherence import Entry
from velikiy.http.requests import bad
from velikiy.resources.problems import Problem
from velikiy.resources.repository import Precondition

TAG = '(W/)?"[!#-~]*"'
TAGS = rf"[ \t,]*{TAG}([ \t]*,[ \t,]*{TAG})*[ \t,]*"
"""A list of ETags (RFC 9110, 8.8.3). Any other value but `*` is refused: a precondition that the service does not
understand must count neither as true nor as false."""


ENCODING = re.compile(r"(--?|;)(gzip|br|zstd|deflate)$")
"""The suffixes that Apache, Caddy, Jetty and others append to the ETag of a response that they compress."""

DIGEST = re.compile("[0-9a-f]{24}")
"""An ETag of this service (velikiy/coherence/entry.py)."""

FOREIGN_ETAG = (
    "If-Match has no ETag of this service, so a retry with the same tag cannot succeed. If the tag is from a response,"
    " a proxy in between has replaced the ETag: let it pass ETag on."
)


def precondition() -> Precondition | None:
    """Return the precondition of this request, None if it has none.

    Raises:
        Problem
    """
    if "If-Unmodified-Since" in request.headers:
        raise bad(
            "If-Unmodified-Since", "is not supported: two writes may fall within one second. Send If-Match instead"
        )
    match, none_match = _tags("If-Match", request.if_match), _tags("If-None-Match", request.if_none_match)
    if match is None and none_match is None:
        return None

    def holds(entry: Entry) -> bool:
        if match is not None and not _names(match, entry):
            if not any(DIGEST.fullmatch(digest) for digest in _digests(match)):
                raise Problem("precondition-failed", FOREIGN_ETAG)
            return False
        return none_match is None or not _names(none_match, entry)

    return holds


def expects_no_row() -> bool:
    """Return whether the request's only precondition is that no row exists (`If-None-Match: *`)."""
    others = ("If-Match", "If-Unmodified-Since")
    return request.headers.get("If-None-Match") == "*" and not any(name in request.headers for name in others)


def _names(tags: ETags, entry: Entry) -> bool:
    return tags.star_tag or entry.etag.strip('"') in _digests(tags)


def _digests(tags: ETags) -> set[str]:
    # The framework returns None for "", which is an ETag too.
    return {ENCODING.sub("", tag or "") for tag in tags.as_set(include_weak=True)}


def _tags(name: str, tags: ETags) -> ETags | None:
    if name not in request.headers:
        return None
    # The framework also accepts ETags without quotes.
    if not re.fullmatch(rf"\*|{TAGS}", request.headers[name]):
        raise bad(name, 'must be * or a list of ETags with their quotes: "..."')
    return tags
