"""Preconditions of a write: If-Match and If-None-Match (RFC 9110, section 13)."""

import re

from flask import request
from werkzeug.datastructures import ETags

from velikiy.coherence import Entry
from velikiy.http.requests import bad
from velikiy.resources.repository import Precondition

TAG = '(W/)?"[!#-~]*"'
TAGS = rf"[ \t,]*{TAG}([ \t]*,[ \t,]*{TAG})*[ \t,]*"
"""A list of ETags (RFC 9110, 8.8.3). Any other value but `*` is refused: a precondition that the service does not
understand must count neither as true nor as false."""


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
        tag = entry.etag.strip('"')
        if match is not None and not (match.star_tag or tag in match):
            return False
        return none_match is None or not (none_match.star_tag or none_match.contains_weak(tag))

    return holds


def _tags(name: str, tags: ETags) -> ETags | None:
    if name not in request.headers:
        return None
    # The framework also accepts ETags without quotes.
    if not re.fullmatch(rf"\*|{TAGS}", request.headers[name]):
        raise bad(name, 'must be * or a list of ETags with their quotes: "..."')
    return tags
