"""Edges ask here each second whether they may go on using their caches. Clients cannot: the edge lets no address
through that begins with `/.`."""

from urllib.parse import quote

import structlog
from flask import Flask, Response, request
from pydantic import BaseModel, Field, ValidationError

from velikiy.coherence import Caches, EdgeTier
from velikiy.coherence.membership import Cache
from velikiy.coherence.timing import LEASE_S
from velikiy.resources.base import Resource
from velikiy.resources.problems import Problem

log = structlog.get_logger()


class _Asked(BaseModel):
    place: str = Field(pattern="^[!-~]{1,100}$")
    epoch: str = Field(pattern="^[!-~]{1,100}$")
    host: str = Field("", max_length=255, pattern="^[0-9A-Za-z.:-]*$")
    """Empty: as this app sees it."""

    port: int = Field(ge=1, le=65_535)


def install(app: Flask, resources: dict[str, Resource], caches: Caches) -> None:
    """Both answer `<milliseconds> <redis> <names>`: of the lease, which the edge counts from before it asked; 1 where
    it may use Redis as long, else 0; and `users:user` for each resource, by which keys in Redis are made. Of
    `order line` an edge would take the first word, and with it another resource's keys: it is `order%20line`."""
    edge_tier = EdgeTier()
    names = " ".join(f"{resource.name}:{quote(resource.singular, safe='')}" for resource in resources.values())

    def lease(redis_is_fenced: bool) -> Response:
        return Response(f"{int(LEASE_S * 1000)} {int(not redis_is_fenced)} {names}", content_type="text/plain")

    @app.post("/.lease/renew")
    def renew() -> Response:
        """409 where the edge is fenced or not known: it has to forget everything, and to register."""
        asked = _asked()
        redis_is_fenced = caches.renew(asked.place, asked.epoch)
        return Response("fenced", 409) if redis_is_fenced is None else lease(redis_is_fenced)

    @app.post("/.lease/register")
    def register() -> Response:
        """424 where it cannot be reached: each write would have to wait for it anew."""
        asked = _asked()
        address = _address(asked)
        edge = Cache(f"{asked.place}@{address}", address, asked.epoch, fenced=False, excluded=False)
        if not edge_tier.reaches(edge):
            log.warning("edge.unreachable", address=address)
            return Response(f"the edge does not answer at {address}", 424)
        return lease(caches.register(asked.place, address, asked.epoch))


def _asked() -> _Asked:
    try:
        return _Asked.model_validate(request.form.to_dict())
    except ValidationError:
        raise Problem(
            "bad-request", "An edge must send its instance id, its epoch and the port of its control listener."
        ) from None


def _address(asked: _Asked) -> str:
    """Where it comes from is where writers reach it, if it does not know better."""
    host = asked.host or request.remote_addr or "127.0.0.1"
    return f"[{host}]:{asked.port}" if ":" in host else f"{host}:{asked.port}"
