"""HTTP, in the order that a request passes it.

middleware          the steps before and behind every route, in two lists
auth                API keys: is the key valid, and may it write?
browsers            what web pages may do: hosts, origins, CORS
routes, batch       the routes of every resource
requests, preconditions     parse a request
responses, problems, problem_pages      build a response; every error becomes a problem
edge_leases         edges renew their cache leases
live                what this app reports for the page Live
health              /livez, /readyz, /health
"""

from flask import Flask

from velikiy.coherence import Gate
from velikiy.http import auth, edge_leases, health, live, middleware, problem_pages, problems, routes
from velikiy.http.auth import Auth
from velikiy.http.browsers import Browsers
from velikiy.resources.base import Resource
from velikiy.resources.idempotency import IdempotencyKeys


def install(
    app: Flask,
    resources: dict[str, Resource],
    gate: Gate,
    browsers: Browsers,
    keys: Auth,
    idempotency_keys: IdempotencyKeys,
) -> None:
    """Add the middleware, the error handlers and every route to the app. They use the servers of this gate."""
    middleware.install(app, browsers, keys)
    problems.install(app)
    problem_pages.install(app)
    routes.install(app, resources, gate, idempotency_keys)
    auth.install(app, keys)
    edge_leases.install(app, resources, gate.caches, gate.edge_tier)
    live.install(app, gate.edge_tier)
    health.install(app, resources, gate.database, gate.redis_tier)
