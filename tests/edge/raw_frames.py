"""A corpus of hostile requests, as kinds times variants: request smuggling, cache poisoning, deception and denial."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

SMUGGLED = b"DELETE /users/2 HTTP/1.1\r\nHost: localhost\r\nX-Rest: "
"""A request that a server would find behind the body of another request, if two servers disagree about its length. The
first line of the next request becomes the value of X-Rest."""

EVIL = b"evil.example"
"""No response to another client may contain this."""


class Frame(NamedTuple):
    kind: str
    data: bytes


def corpus() -> list[Frame]:
    """Return all frames. Some are incomplete: the server refuses them, or waits for the rest."""
    kinds = (transfer_encodings, lengths, chunks, line_ends, targets, hosts, unkeyed_headers, deceptions, oversized)
    others = (conditions, fat_reads, parameters, pipelines)
    return [Frame(kind.__name__, data) for kind in (*kinds, *others) for data in kind()]


def request(
    line: bytes = b"GET /users/2 HTTP/1.1", headers: bytes = b"", body: bytes = b"", *, host: bool = True
) -> bytes:
    return line + b"\r\n" + (b"Host: localhost\r\n" if host else b"") + headers + b"\r\n" + body


POST = b"POST /users HTTP/1.1"
GET = b"GET /users/2 HTTP/1.1"
JSON = b"Content-Type: application/json\r\n"


def transfer_encodings() -> Iterator[bytes]:
    """CL.TE, TE.CL and TE.TE: two lengths, of which a server may read the wrong one."""
    names = (
        b"Transfer-Encoding",
        b"transfer-encoding",
        b"Transfer_Encoding",
        b"Transfer-Encoding ",
        b" Transfer-Encoding",
    )
    values = (
        *(b"chunked", b" chunked", b"chunked ", b"\tchunked", b"xchunked", b"chunked, identity", b"identity, chunked"),
        *(
            b"chunked\r\nTransfer-Encoding: x",
            b"x\r\nTransfer-Encoding: chunked",
            b"Chunked",
            b'"chunked"',
            b"chunked;q=1",
        ),
        *(b"chunked\x00", b"\x0bchunked", b"gzip, chunked", b"", b"chunked\r\n x", b"\r\n chunked"),
    )
    for name, value in product(names, values):
        line = POST if name == names[0] else GET
        body = b"0\r\n\r\n" + SMUGGLED
        yield request(line, JSON + b"Content-Length: %d\r\n%b: %b\r\n" % (len(body), name, value), body)
    for value, line in product(values[:9], (POST, GET)):
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
        yield request(line, JSON + b"Transfer-Encoding: %b\r\nContent-Length: 4\r\n" % value, body)


def lengths() -> Iterator[bytes]:
    values = (
        *(
            b"+5",
            b"-1",
            b"5, 5",
            b"5,6",
            b"0x5",
            b"5 ",
            b"5\r\nContent-Length: 6",
            b"5\r\nContent-Length: 5",
            b"",
            b"5;",
        ),
        *(b"\xef\xbc\x95", b"1e1", b"05", b"99999999999999999999", b"5\x00", b"0\r\nContent-Length: 5", b"5\r\n 0"),
    )
    for value, line in product(values, (POST, GET, b"DELETE /users/0 HTTP/1.1")):
        yield request(line, JSON + b"Content-Length: %b\r\n" % value, b"12345" + SMUGGLED)


def chunks() -> Iterator[bytes]:
    sizes = (
        *(
            b"5;ext=1\r\n",
            b"5;\n",
            b"0x5\r\n",
            b"+5\r\n",
            b"5 \r\n",
            b"05\r\n",
            b"FFFFFFFFFFFFFFFFF\r\n",
            b"-1\r\n",
            b"5\n",
        ),
        *(b"5\r", b"\r\n", b"g\r\n", b"5\x00\r\n", b'5;a="\r\n"\r\n', b"5\r\r\n", b"5;\x00\r\n"),
    )
    for size, trailer in product(sizes, (b"", b"X: y\r\n", b"Content-Length: 5\r\n", b"Host: evil.example\r\n")):
        body = size + b"12345\r\n0\r\n" + trailer + b"\r\n" + SMUGGLED
        yield request(POST, JSON + b"Transfer-Encoding: chunked\r\n", body)


def line_ends() -> Iterator[bytes]:
    """Bare LF, bare CR, folded lines and control characters, where servers may find or miss the end of a line."""
    smuggled = b"Content-Length: 60"
    for end in (
        b"\n",
        b"\r",
        b"\r\r\n",
        b"\n\r\n",
        b"\r\n ",
        b"\r\n\t",
        b"\x0b\r\n",
        b"\x00\r\n",
        b"\x0c\r\n",
        b"\n\n",
    ):
        yield GET + end + b"Host: localhost\r\n" + smuggled + b"\r\n\r\n" + SMUGGLED
        yield GET + b"\r\nHost: localhost" + end + smuggled + b"\r\n\r\n" + SMUGGLED
        yield GET + b"\r\nHost: localhost\r\nX: y" + end + b"X-Forwarded-Host: evil.example\r\n\r\n"
        yield GET + b"\r\nHost: localhost\r\n" + smuggled + end + end + SMUGGLED
        yield POST + b"\r\nHost: localhost\r\nX: y" + end + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED
        yield end + GET + b"\r\nHost: localhost\r\n\r\n"


def targets() -> Iterator[bytes]:
    forms = (
        *(
            b"http://evil.example/users/2",
            b"http://localhost/users/2",
            b"HTTP://localhost/users/2",
            b"//evil.example/users/2",
        ),
        *(
            b"http://localhost@evil.example/users/2",
            b"evil.example:80",
            b"*",
            b"users/2",
            b"/users/2\tx",
            b"/users/2#x",
        ),
        *(b"\\users\\2", b"http:///users/2", b"https://localhost/users/2", b"/users/2 /users/3", b"http://localhost"),
        *(b"/users/\x002", b"/users/2\x7f", b"/users/\xff", b"/.app", b"/.problem", b"/.https", b"/.lease/renew"),
    )
    for method, form in product((b"GET", b"POST"), forms):
        yield request(b"%b %b HTTP/1.1" % (method, form))
    for version in (
        b"HTTP/0.9",
        b"HTTP/1.0",
        b"HTTP/1.2",
        b"HTTP/2.0",
        b"HTTP/1.1 ",
        b"HTTP/01.1",
        b"http/1.1",
        b"HTTP/1.1\x00",
    ):
        yield request(b"GET /users/2 " + version)
    yield b"GET /users/2\r\n\r\n"
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield request(
        headers=b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAA\r\n"
    )


def hosts() -> Iterator[bytes]:
    values = (
        *(b"localhost\r\nHost: evil.example", b"evil.example\r\nHost: localhost", b"evil.example", b"", b"localhost:1"),
        *(b"localhost:x", b"localhost, evil.example", b"a@evil.example", b"evil.example/", b"LOCALHOST", b"localhost."),
        *(
            b"[::1]",
            b"[::1",
            b"127.0.0.1:80:80",
            b"localhost\x00evil.example",
            b"\tlocalhost",
            b"localhost\r\n evil.example",
        ),
    )
    for value, path in product(values, (b"/users/2", b"/users")):
        yield request(b"GET %b HTTP/1.1" % path, b"Host: %b\r\n" % value, host=False)


UNKEYED = (
    *("X-Forwarded-Host", "X-Host", "X-Forwarded-Server", "X-HTTP-Host-Override", "Forwarded", "X-Original-URL"),
    *("X-Rewrite-URL", "X-Forwarded-Proto", "X-Forwarded-Scheme", "X-Forwarded-Port", "X-Forwarded-Prefix"),
    *("X-Forwarded-For", "X-Real-IP", "True-Client-IP", "X-Original-Host", "X-HTTP-Method-Override", "X-HTTP-Method"),
    *(
        "X-Method-Override",
        "X-Accel-Redirect",
        "X-Accel-Expires",
        "Path-Prefix",
        "Fill-Lease",
        "Edge-Lease",
        "Edge-Check",
    ),
    *("Write-Deadline", "Client-Request-Id", "X-Request-Id", "Traceparent", "Origin", "Referer", "Cookie", "App"),
    *("Accept-Language", "User-Agent", "Via", "Cache-Status", "Surrogate-Capability", "X-Cache-Status"),
)


def unkeyed_headers() -> Iterator[bytes]:
    for name, value in product(UNKEYED, (b"/evil.example",)):
        yield request(headers=name.encode() + b": " + value + b"\r\n")
    for name in UNKEYED:  # a response with Link
        yield request(b"GET /users?limit=1 HTTP/1.1", headers=name.encode() + b": /evil.example\r\n")


def deceptions() -> Iterator[bytes]:
    suffixes = (
        *(b"/x.css", b";.css", b"%2fx.css", b"%3b.css", b".css", b"/..%2f..%2fusers/1", b"%00.css", b"?.css", b"#.css"),
        *(
            b"/.css",
            b"/",
            b"//",
            b"/%2e%2e/1",
            b"/../1",
            b"/./",
            b"%20",
            b"%0d%0aX:y",
            b"\\x.css",
            b";jsessionid=1",
            b"~",
        ),
        *(b"%", b"%zz", b"%252f", b"?x=/users/1", b"/count", b"0", b".0", b"e0", b"%32"),
    )
    for method, suffix in product((b"GET", b"HEAD"), suffixes):
        yield request(b"%b /users/2%b HTTP/1.1" % (method, suffix))
    for path in (
        b"/users/../users/1",
        b"/users//2",
        b"/Users/2",
        b"/users/%32",
        b"/users/2/../1",
        b"/u%73ers/2",
        b"/users/02",
    ):
        yield request(b"GET %b HTTP/1.1" % path)


def oversized() -> Iterator[bytes]:
    """CPDoS: an error that a cache would keep for a good address."""
    for size in (5_000, 9_000, 17_000, 70_000):
        yield request(headers=b"X-Large: " + b"a" * size + b"\r\n")
        yield request(headers=b"X-Many: a\r\n" * (size // 11))
        yield request(b"GET /users/2?q=" + b"a" * size + b" HTTP/1.1")
    for character in b"\x01\x07\x08\x0b\x0c\x1b\x7f\x80\xff\x00":
        yield request(headers=b"X-Meta: a%cb\r\n" % character)
        yield request(headers=b"Accept: a%cb\r\n" % character)
        yield request(headers=b"X%cMeta: a\r\n" % character)


def conditions() -> Iterator[bytes]:
    headers = (
        *(b"Range: bytes=0-1", b"Range: bytes=99-", b"Range: bytes=-1,0-,0-,0-", b"If-Range: x\r\nRange: bytes=0-1"),
        *(b"If-None-Match: *", b'If-None-Match: "x', b"If-None-Match:", b'If-Match: "x"', b"If-Match:", b"If-Match: *"),
        *(b"If-Modified-Since: Sat, 29 Oct 2050 19:43:31 GMT", b"If-Unmodified-Since: Sat, 29 Oct 1994 19:43:31 GMT"),
        *(b"Accept: text/html", b"Accept: */*;q=0", b'Accept: "', b"Accept: application/json\r\nAccept: x/y"),
        *(b"Expect: 100-continue", b"Expect: evil", b"Upgrade: websocket\r\nConnection: Upgrade", b"Max-Forwards: 0"),
        *(
            b"Connection: Host",
            b"Connection: close, X-Forwarded-For",
            b"TE: trailers",
            b"Trailer: Host",
            b"Keep-Alive: 0",
        ),
        *(
            b"Accept-Encoding: evil",
            b"Accept-Encoding: gzip;q=0, *;q=0",
            b"Content-Encoding: gzip",
            b"Pragma: no-cache",
        ),
        *(
            b"Cache-Control: no-store",
            b"Cache-Control: only-if-cached",
            b"Authorization: Basic eA==",
            b"Content-Type: \xff",
        ),
    )
    for path, header in product((b"/users/2", b"/users"), headers):
        yield request(b"GET %b HTTP/1.1" % path, header + b"\r\n")


def fat_reads() -> Iterator[bytes]:
    body = b'{"name": "evil.example"}'
    for method, path in product((b"GET", b"HEAD", b"OPTIONS"), (b"/users/2", b"/users", b"/users?limit=1")):
        line = b"%b %b HTTP/1.1" % (method, path)
        yield request(line, JSON + b"Content-Length: %d\r\n" % len(body), body)
        yield request(line, b"Transfer-Encoding: chunked\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        yield request(line, b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 9\r\n", b"q=evil&a=")


def parameters() -> Iterator[bytes]:
    queries = (
        *(b"limit=1;limit=2", b"limit=1&limit=2", b"limit=1%26limit=2", b"limit=1&Limit=2", b"q=a&q=b", b"utm=x;q=a"),
        *(b"%6cimit=1", b"limit=1%00", b"limit[]=1", b"&limit=1", b"limit=1&", b"limit", b"limit=", b"?limit=1"),
        *(b"limit=1?limit=2", b"_method=DELETE", b"callback=evil.example", b"limit=1&x=evil.example", b"q=%ff", b"q=%"),
    )
    for path, query in product((b"/users", b"/users/2"), queries):
        yield request(b"GET %b?%b HTTP/1.1" % (path, query))


def pipelines() -> Iterator[bytes]:
    """Several requests at once, the last of which is incomplete."""
    firsts = (
        GET,
        b"HEAD /users/2 HTTP/1.1",
        b"GET /users/0 HTTP/1.1",
        b"OPTIONS /users HTTP/1.1",
        b"BAD /users/2 HTTP/1.1",
    )
    for first, rest in product(
        firsts, (SMUGGLED, b"GET /users/1 HTTP/1.1\r\nHost: localhost\r\nX: ", b"\r\n\r\n\x00", b"GET")
    ):
        yield request(first) + rest


# ---- HTTP/2 ----


def http2_frames() -> list[Frame]:
    """Requests over HTTP/2 that would be two requests, or another request, if the edge wrote them as HTTP/1.1."""
    plain = {b":method": b"GET", b":scheme": b"https", b":path": b"/users/2", b":authority": b"localhost"}
    injected = b"x\r\nTransfer-Encoding: chunked\r\n\r\n" + SMUGGLED
    changes: list[list[tuple[bytes, bytes]]] = [
        *([(b"transfer-encoding", value)] for value in (b"chunked", b"identity", b" chunked", b"x, chunked")),
        *([(b"content-length", value)] for value in (b"0", b"5", b"-1", b"5, 5", b"")),
        *([(name, injected)] for name in (b"x", b"accept", b"cookie", b"host", b"if-none-match", b"user-agent")),
        *([(name, b"y")] for name in (b"x\r\nhost: evil.example\r\ny", b"x y", b"x:", b"X", b"", b"x\x00")),
        *([(b"host", value)] for value in (b"evil.example", b"localhost", b"")),
        *([(name, b"evil.example")] for name in (b"x-forwarded-host", b"connection", b"keep-alive", b"te", b"upgrade")),
    ]
    fields = [[*plain.items(), *change] for change in changes]
    for name, values in {
        b":method": (b"GET /users/1 HTTP/1.1\r\nX: ", b"get", b"", b"G T", b"DELETE\r\n"),
        b":path": (
            b"/users/2 HTTP/1.1\r\nHost: evil.example\r\nX: ",
            b"",
            b"users/2",
            b"*",
            b"http://evil.example/users/2",
        ),
        b":scheme": (b"http", b"evil.example", b"", b"https://evil.example/?", b"x\r\n"),
        b":authority": (b"evil.example", b"", b"localhost\r\nX: y", b"a@localhost", b"localhost:1"),
        b":evil": (b"x",),
    }.items():
        fields += [list({**plain, name: value}.items()) for value in values]
        fields += [[*plain.items(), (name, values[0])]]
    return [Frame("http2", HTTP2_START + _headers_frame(each)) for each in fields]


HTTP2_START = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""The preface and an empty SETTINGS frame (RFC 9113)."""


def _headers_frame(fields: list[tuple[bytes, bytes]]) -> bytes:
    """Return a HEADERS frame that ends its stream. Each field is a literal without indexing (RFC 7541, 6.2.2)."""
    block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)
    return len(block).to_bytes(3, "big") + b"\x01\x05\x00\x00\x00\x01" + block


def _text(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)]) + text
    assert len(text) < 255
    return b"\x7f" + bytes([len(text) - 127]) + text
