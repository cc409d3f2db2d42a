"""Show the entry of each tier for one address, and purge its path, for the console (docs/console.md)."""

from typing import Literal

from flask import Blueprint, Flask, Response
from pydantic import Field

from velikiy.coherence import CachePath, Gate, inspect
from velikiy.http import requests, responses
from velikiy.resources.base import Strict, path_of
from velikiy.settings import Settings


class Purge(Strict):
    path: str = Field(max_length=1000)
    tier: Literal["all", "nginx"] = "all"
    """`nginx` leaves the entries in Redis, so that the next read shows the second tier."""


def install(app: Flask, gate: Gate, settings: Settings) -> None:
    """Add `GET /console/tiers?path=` and `POST /console/purge`."""
    routes = Blueprint("console_tiers", __name__, url_prefix="/console")

    @routes.get("/tiers")
    def tiers() -> Response:
        address = requests.parameters("path").get("path", "")
        path = _cache_path(address)
        return responses.uncached({"path": address, "tiers": inspect.look(gate, path, address, settings)})

    @routes.post("/purge")
    def purge() -> Response:
        requests.parameters()
        wanted = requests.body(Purge)
        path = _cache_path(wanted.path)
        with gate.database.autocommit() as connection:
            if wanted.tier == "all":
                gate.drop(connection, [path])
            redis, *edges = gate.caches.all(connection)
        silent = [edge for edge in edges if edge.fenced]
        if wanted.tier == "nginx":
            # An edge that does not answer keeps its entry, which is not stale: nothing was written.
            silent += gate.edge_tier.drop([edge for edge in edges if not edge.fenced], [path])
        names = ["redis"] if redis.fenced else []
        names += [f"edge {edge.address}" for edge in silent]
        return responses.uncached({"message": "Purged", "path": path.path, "edges": len(edges), "silent": names})

    app.register_blueprint(routes)


def _cache_path(address: str) -> CachePath:
    """Raises: Problem"""
    path = path_of(address)
    if path is None:
        raise requests.bad("path", "is no cached address, such as /users, /users?limit=5, /users/count or /users/7")
    return path
