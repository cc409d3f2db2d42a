"""Velikiy Flask: a users service on Flask and PostgreSQL, cached in Redis and in Nginx."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from velikiy.settings import Settings

__version__ = "0.1.0"
"""The version of the last release, as in pyproject.toml. docs/releasing.md shows how it grows."""


def create_app(settings: Settings | None = None) -> Flask:
    """Return the app, with everything wired top to bottom. It connects in the background and waits for no server."""
    # Imports inside the function: a part of this package, such as the launcher, must not import all of Flask.
    from flask import Flask

    from velikiy import http, logs, traces
    from velikiy.coherence import connect
    from velikiy.console import exports, imports, page, site_files, swagger, tiers
    from velikiy.http.auth import Auth
    from velikiy.http.browsers import Browsers
    from velikiy.openapi import document as openapi
    from velikiy.postgres import Database
    from velikiy.resources.base import registry
    from velikiy.resources.idempotency import IdempotencyKeys
    from velikiy.settings import Settings, load

    settings = settings or load(Settings)
    logs.configure(settings.log_level)

    database = Database(
        settings.database_url,
        size=settings.app_threads,
        timeout=settings.database_timeout,
        pooled=settings.database_direct_url is not None,
    )
    gate = connect(database, settings)

    app = Flask(__name__, static_folder=None)
    auth, idempotency_keys = Auth(settings.auth_mode, gate), IdempotencyKeys(settings.quota_of_idempotency_keys)
    http.install(app, registry(), gate, Browsers.of(settings), auth, idempotency_keys)
    openapi.install(app, registry())
    swagger.install(app)
    site_files.install(app)
    page.install(app, auth)
    tiers.install(app, gate, settings)
    imports.install(app, registry(), gate, idempotency_keys)
    exports.install(app, registry(), gate, settings.edge_secret)
    database.open()
    traces.start(settings.traces_url)
    return app
