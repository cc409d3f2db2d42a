"""The unit of invalidation, and the form in which a tier stores a response."""

import hashlib
import re
from typing import NamedTuple

_HEAD = re.compile(rb'(200|404)\t("[!#-~]+"|)\t([\x20-\x7e]*)\t([\x20-\x7e]*)\n')


class CachePath(NamedTuple):
    """A path without its query. Its variants (pages, searches) are dropped together."""

    path: str
    """The path as clients spell it: `/users/7`."""

    key: str
    """The key of its hash in Redis: `user:7`."""

    @property
    def table(self) -> str:
        """The first part of the path: `users`."""
        return self.path.split("/", 2)[1]


class Entry(NamedTuple):
    """A response as a tier stores it: the status, the headers that vary, and the bytes of the body.

    Both tiers store `<status>\\t<etag>\\t<last-modified>\\t<link>\\n<body>`. Python and Lua cut it once, at the first
    line feed, and send the rest unparsed. A 404 is an entry as well, because clients request missing rows as often as
    others. Its body is the problem without the id of the request, which is inserted before the last brace when it is
    served.
    """

    status: int
    body: bytes
    etag: str = ""
    modified: str = ""
    """The value of `Last-Modified`."""

    link: str = ""

    def pack(self) -> bytes:
        head = f"{self.status}\t{self.etag}\t{self.modified}\t{self.link}\n"
        return head.encode("ascii") + self.body

    @classmethod
    def unpack(cls, stored: bytes) -> "Entry":
        """Raises: ValueError: The bytes are not an entry."""
        head = _HEAD.match(stored)
        if not head or stored.endswith(b"\n"):
            raise ValueError("no entry")
        etag, modified, link = (head[n].decode() for n in (2, 3, 4))
        return cls(int(head[1]), stored[head.end() :], etag, modified, link)


def found(body: bytes, *, modified: str = "", link: str = "") -> Entry:
    """Return the entry for a body, with a strong ETag (RFC 9110, 8.8.3): a digest of what is sent.

    The digest covers the row's version and time, which are in the body. The version alone does not suffice: a database
    that was restored from a backup counts the same numbers again, for other rows.
    """
    digest = hashlib.blake2b(body + link.encode("ascii"), digest_size=12).hexdigest()
    return Entry(200, body, f'"{digest}"', modified, link)
