"""The rules for web pages: which host names reach the service, which origins may write, and which may read (CORS).

A browser carries out some requests of any page, to any address that its reader can reach. The edge applies the same
rules to the responses that it sends by itself (edge/lua/hosts.lua, edge/conf/cors.conf).
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from flask import Response, request

from velikiy.http.problems import DETAILS
from velikiy.resources.problems import Problem
from velikiy.settings import Settings, is_loopback

READ_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")

EXPOSED_HEADERS = (
    "Accept-Patch, Age, Allow, Cache-Status, ETag, Idempotency-Replayed, Link, Location, Preference-Applied,"
    " RateLimit, RateLimit-Policy, Retry-After, WWW-Authenticate, X-Cache-Status, X-Request-Id"
)
"""The headers of a response that a page of an allowed origin may read. The Fetch standard names a few more, such as
Content-Type."""

PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE",
    # `*` stands for the headers that libraries add, such as traceparent. It does not cover Authorization, and browsers
    # from before 2019 do not know it.
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, Prefer, *",
    "Access-Control-Max-Age": "600",
}
"""The permission of an origin counts for ten minutes, so that a removed origin does not keep it for long."""


@dataclass(frozen=True)
class Hosts:
    """The names that may stand in `Host`: a foreign name that leads here belongs to a page that rebinds its DNS name
    in order to read as if it were of the same origin."""

    names: frozenset[str]
    domains: tuple[str, ...] = ()
    """With a dot before each. The name itself and every name below it are allowed."""

    any_address: bool = False
    """True if the service listens on every address. A page cannot rebind an address."""

    def allow(self, header: str) -> bool:
        host = header.lower()
        host = f"{host.partition(']')[0]}]" if host.startswith("[") else host.partition(":")[0].removesuffix(".")
        return (
            host in self.names or f".{host}".endswith(self.domains) or (self.any_address and _address(host) is not None)
        )


def allowed_hosts(listens_on: str, setting: str) -> Hosts | None:
    """Return the names that may stand in `Host`, None for any name.

    Args:
        listens_on: The address where clients reach the service.
        setting: ALLOWED_HOSTS.
    """
    members = setting.split(",") if setting else []
    address = _address(listens_on)
    if "*" in members or not (members or is_loopback(listens_on)):
        return None
    own = f"[{address}]" if address and address.version == 6 else listens_on
    return Hosts(
        frozenset({*LOCAL_HOSTS, own, *(member for member in members if not member.startswith("."))}),
        tuple(member for member in members if member.startswith(".")),
        any_address=address is not None and address.is_unspecified,
    )


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None


@dataclass(frozen=True)
class Browsers:
    """The rules for requests of browsers. The default allows every name in `Host`, and no origin but the service's own
    one."""

    hosts: Hosts | None = None
    origins: frozenset[str] = frozenset()

    @classmethod
    def of(cls, settings: Settings) -> "Browsers":
        origins = frozenset(settings.cors_origins.split(",")) - {""}
        return cls(allowed_hosts(settings.listens_on, settings.allowed_hosts), origins)

    def refuse_other_hosts(self) -> None:
        """Refuse a request for a name that is not the service's. Without `Host` the sender is no browser."""
        host = request.environ.get("HTTP_HOST")
        if self.hosts and host and not self.hosts.allow(host):
            raise Problem("misdirected-request", DETAILS[421])

    def answer_preflight(self) -> Response | None:
        """Answer the question of a browser whether a page of another origin may send a request."""
        is_preflight = request.method == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in request.environ
        return Response(status=204, headers=PREFLIGHT_HEADERS) if is_preflight and self._allowed_origin() else None

    def refuse_other_origins(self) -> None:
        """Refuse a write by a web page of another origin, unless CORS_ORIGINS has that origin."""
        if request.method not in READ_METHODS and _is_cross_origin() and not self._allowed_origin():
            detail = (
                "A web page of another origin may not write here. Write from a page of this origin or of an origin in"
                " CORS_ORIGINS, or from a program, which sends neither Origin nor Sec-Fetch-Site."
            )
            raise Problem("forbidden", detail)

    def share(self, response: Response) -> Response:
        """Let the page that sent the request read the response, if CORS_ORIGINS has its origin."""
        if self.origins:
            response.headers.add("Vary", "Origin")
            if origin := self._allowed_origin():
                response.headers.add("Access-Control-Allow-Origin", origin)
                response.headers.add("Access-Control-Expose-Headers", EXPOSED_HEADERS)
        return response

    def _allowed_origin(self) -> str | None:
        origin = request.environ.get("HTTP_ORIGIN", "")
        return origin if origin in self.origins else None


def _is_cross_origin() -> bool:
    """Return whether a web page of another origin sent this request, by the rules of Go's CrossOriginProtection
    (net/http). A browser sends some requests of a page to any address without asking the service."""
    environ = request.environ
    if site := environ.get("HTTP_SEC_FETCH_SITE"):
        # Only the browser sets this header, and it knows the address that it shows. So this header decides if both are
        # present: with "same-origin" no browser sends a foreign Origin, but a proxy may have changed Host.
        return site not in ("same-origin", "none")
    # A browser that is old, or does not trust plain HTTP, sends only Origin. A program sends neither header.
    if not (origin := environ.get("HTTP_ORIGIN", "").lower()):
        return False
    scheme = origin.partition("://")[0]
    port = DEFAULT_PORTS.get(scheme, "")
    host = environ.get("HTTP_HOST", "").lower().removesuffix(port)
    # The edge knows the scheme if it serves https itself or if a trusted proxy reports the scheme.
    known_scheme = environ.get("HTTP_X_FORWARDED_PROTO", scheme).lower()
    return bool(origin.removesuffix(port) != f"{scheme}://{host}" or scheme != known_scheme)
