"""The unit of invalidation, and what a tier stores of it."""

from typing import NamedTuple


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
        head, _, body = stored.partition(b"\n")
        status, _, link = head.partition(b" ")
        return cls(int(status), body, link.decode())
