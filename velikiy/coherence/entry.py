"""The unit of invalidation, and what a tier stores of it."""

import re
from typing import NamedTuple

_HEAD = re.compile(rb"(200|404) ([\x20-\x7e]*)\n")


class Path(NamedTuple):
    """A resource's path without its query; all its variants (pages, searches) are dropped together."""

    path: str
    """As clients spell it: `/users/7`."""

    key: str
    """Of its hash in Redis: `user:7`."""


class Entry(NamedTuple):
    """An answer as a tier keeps it: the status, the one header that varies, and the body's bytes.

    In Redis it is `<status> <link>\\n<body>`, so that whoever serves it, in Python or in Lua, cuts once at the
    first line feed and passes the rest on unparsed. A missing resource is an entry too (404, no body): what
    does not exist is asked for as often as what does.
    """

    status: int
    body: bytes = b""
    link: str = ""

    def pack(self) -> bytes:
        return b"%d %s\n%s" % (self.status, self.link.encode(), self.body)

    @classmethod
    def unpack(cls, stored: bytes) -> "Entry":
        """Raises: ValueError, where it is none."""
        head = _HEAD.match(stored)
        if not head:
            raise ValueError("no entry")
        return cls(int(head[1]), stored[head.end() :], head[2].decode())
