"""Grant, renew and end the cache lease of an edge.

Each edge renews its lease once a second, and resigns before it is stopped. Clients cannot send these requests: an edge
answers 404 to every address that begins with `/.`. Other programs cannot either: requests and responses are signed
(velikiy/signatures.py).
"""

from urllib.parse import quote

import structlog
from flask import Flask, Response, request
from pydantic import BaseModel, Field, ValidationError

from velikiy.coherence import Caches, EdgeTier
from velikiy.coherence.membership import Cache, Grant
from velikiy.coherence.timing import LEASE_S
from velikiy.resources.base import Resource
from velikiy.resources.problems import Problem
from velikiy.signatures import HEADER, Signer

log = structlog.get_logger()


class _Edge(BaseModel):
    instance_id: str = Field(pattern="^[!-~]{1,100}$")
    epoch: str = Field(pattern="^[!-~]{1,100}$")
    host: str = Field("", max_length=255, pattern="^[0-9A-Za-z.:-]*$")
    """Empty: the source address of the request."""

    port: int = Field(ge=1, le=65_535)


def install(app: Flask, resources: dict[str, Resource], caches: Caches, edge_tier: EdgeTier) -> None:
    """Add the routes. A lease is `<milliseconds> <redis> <names>`: the time of the lease, which the edge counts from
    before its request; the id of the server that the edge may use as Redis as long, or `-` for none; and `users:user`
    for each resource, from which the edge makes the keys in Redis. The names are separated by spaces, so a singular
    such as "order line" is encoded as `order%20line`."""
    signer = edge_tier.signer
    names = " ".join(f"{resource.name}:{quote(resource.singular, safe='')}" for resource in resources.values())

    def lease(grant: Grant) -> str:
        return f"{int(LEASE_S * 1000)} {grant.redis or '-'} {names}"

    @app.post("/.lease/renew")
    def renew() -> Response:
        """Return the lease, or 409 if the edge is fenced or unknown: it drops every entry and registers."""
        request_mac = _request_mac(signer)
        edge = _parse()
        grant = caches.renew(edge.instance_id, edge.epoch)
        status, body = (200, lease(grant)) if grant else (409, "fenced")
        return _signed(signer, request_mac, status, body)

    @app.post("/.lease/register")
    def register() -> Response:
        """Return the lease. Or return 424 if no request reaches the edge, because each write would wait for its
        exclusion again, 403 if MAX_EDGES are registered, or 429 and the seconds to wait if writers have fenced the edge
        again and again. No other program can answer for the edge, because the edge
        signs."""
        request_mac = _request_mac(signer)
        edge = _parse()
        address = _address(edge)
        cache = Cache(f"{edge.instance_id}@{address}", address, edge.epoch, fenced=False, excluded=False)
        if pause := caches.pause_left(cache.name, edge.epoch):
            return _signed(signer, request_mac, 429, f"{pause:.1f}")
        if not edge_tier.reaches(cache):
            log.warning("edge.unreachable", address=address)
            return _signed(signer, request_mac, 424, f"the edge does not answer at {address}")
        grant = caches.register(edge.instance_id, address, edge.epoch)
        status, body = (200, lease(grant)) if grant else (403, "too many edges")
        return _signed(signer, request_mac, status, body)

    @app.post("/.lease/resign")
    def resign() -> Response:
        """Delete the row of an edge that uses its cache no longer, so that no write waits for the edge."""
        request_mac = _request_mac(signer)
        edge = _parse()
        caches.resign(edge.instance_id, edge.epoch)
        return _signed(signer, request_mac, 200, "0")


def _request_mac(signer: Signer) -> str:
    body = request.get_data().decode("utf-8", "replace")  # before the form, which would consume it
    mac = signer.request_mac(request.headers.get(HEADER, ""), request.method, request.path, body=body)
    if mac is None:
        raise Problem("not-found", "Nothing exists at this address.")
    return mac


def _signed(signer: Signer, request_mac: str, status: int, body: str) -> Response:
    headers = {HEADER: signer.response_mac(request_mac, status, body)}
    return Response(body, status, headers, content_type="text/plain")


def _parse() -> _Edge:
    try:
        return _Edge.model_validate(request.form.to_dict())
    except ValidationError:
        raise Problem(
            "bad-request", "An edge must send its instance id, its epoch and the port of its control listener."
        ) from None


def _address(edge: _Edge) -> str:
    """Return the address of the control listener: the configured host, or else the source of the request.

    A request at a Unix socket has no source, and its edge is on this machine.
    """
    host = edge.host or request.remote_addr or "127.0.0.1"
    return f"[{host}]:{edge.port}" if ":" in host else f"{host}:{edge.port}"
