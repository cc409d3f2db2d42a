"""Edges ask here each second whether they may go on using their caches. Clients cannot: the edge lets no address
through that begins with `/.`."""

from flask import Flask, Response, request
from pydantic import BaseModel, Field, ValidationError

from velikiy.coherence import Caches
from velikiy.coherence.caches import LEASE
from velikiy.problems import Problem


class _Asked(BaseModel):
    name: str = Field(min_length=1, max_length=200)
    epoch: str = Field(min_length=1, max_length=100)
    port: int = Field(ge=1, le=65_535)


def install(app: Flask, caches: Caches) -> None:
    """Both answer with the milliseconds of the lease, which the edge counts from before it asked."""

    @app.post("/.lease/renew")
    def renew() -> Response:
        """409 where the edge is fenced or not known: it has to forget everything, and to register."""
        asked = _asked()
        return _lease() if caches.renew(asked.name, asked.epoch) else Response("fenced", 409)

    @app.post("/.lease/register")
    def register() -> Response:
        asked = _asked()
        # Where it comes from is where writers reach it: nobody has to tell an edge its own address.
        host = request.remote_addr or "127.0.0.1"
        caches.register(asked.name, f"[{host}]:{asked.port}" if ":" in host else f"{host}:{asked.port}", asked.epoch)
        return _lease()


def _asked() -> _Asked:
    try:
        return _Asked.model_validate(request.form.to_dict())
    except ValidationError:
        raise Problem(400, "An edge asks with its name, its epoch and the port of its control listener.") from None


def _lease() -> Response:
    return Response(str(int(LEASE * 1000)), content_type="text/plain")
