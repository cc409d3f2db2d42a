"""The unit of invalidation, and what a tier stores of it."""

import hashlib
import re
from typing import NamedTuple

_HEAD = re.compile(rb'(200|404)\t("[!#-~]+"|)\t([\x20-\x7e]*)\t([\x20-\x7e]*)\n')


class Path(NamedTuple):
    """A resource's path without its query; all its variants (pages, searches) are dropped together."""

    path: str
    """As clients spell it: `/users/7`."""

    key: str
    """Of its hash in Redis: `user:7`."""


class Entry(NamedTuple):
    """An answer as a tier keeps it: the status, the headers that vary, and the body's bytes.

    In Redis it is `<status>\\t<etag>\\t<last-modified>\\t<link>\\n<body>`, so that whoever serves it, in Python or in
    Lua, cuts once at the first line feed and passes the rest on unparsed. A missing resource is an entry too: what does
    not exist is asked for as often as what does. Its body is the problem without the id of the request, which whoever
    serves it puts before the last brace.
    """

    status: int
    body: bytes
    etag: str = ""
    modified: str = ""
    """As in `Last-Modified`."""

    link: str = ""

    def pack(self) -> bytes:
        head = f"{self.status}\t{self.etag}\t{self.modified}\t{self.link}\n"
        return head.encode("ascii") + self.body

    @classmethod
    def unpack(cls, stored: bytes) -> "Entry":
        """Raises: ValueError, where it is none."""
        head = _HEAD.match(stored)
        if not head or stored.endswith(b"\n"):
            raise ValueError("no entry")
        etag, modified, link = (head[n].decode() for n in (2, 3, 4))
        return cls(int(head[1]), stored[head.end() :], etag, modified, link)


def found(body: bytes, *, modified: str = "", link: str = "") -> Entry:
    """With a strong ETag (RFC 9110, 8.8.3): a digest of what is sent.

    The row's version and time are in the body, and so in the digest. The version alone would not do: a database that
    was set back to a backup counts the same numbers again, for other rows.
    """
    digest = hashlib.blake2b(body + link.encode("ascii"), digest_size=12).hexdigest()
    return Entry(200, body, f'"{digest}"', modified, link)
