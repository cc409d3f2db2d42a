"""The routes of every resource: parse the request, call the repository, build the response."""

from collections.abc import Callable
from functools import partial

from flask import Blueprint, Flask, Response
from werkzeug.exceptions import NotFound
from werkzeug.routing import BaseConverter

from velikiy.coherence import Change, Entry, Gate
from velikiy.http import batch, middleware, requests, responses
from velikiy.http.preconditions import expects_no_row, precondition
from velikiy.http.requests import JSON, MAX_BATCH_BYTES, MERGE_PATCH
from velikiy.postgres import Connection
from velikiy.resources import ids
from velikiy.resources.base import HISTORY, ID, MAX_ID, Resource
from velikiy.resources.idempotency import IdempotencyKeys, StoredResponse
from velikiy.resources.pagination import BadCursor
from velikiy.resources.repository import Repository


class IdConverter(BaseConverter):
    """An id in its one spelling. Flask's own `int` accepts 007 and ٧ for 7, each of which would be a cache entry."""

    regex = ID

    def to_python(self, value: str) -> int:
        row_id = int(value)
        if row_id > MAX_ID:
            raise NotFound  # werkzeug's own "no match" ends in 405 if another route has this method
        return row_id


def install(app: Flask, resources: dict[str, Resource], gate: Gate, keys: IdempotencyKeys) -> None:
    app.url_map.converters["id"] = IdConverter
    app.url_map.merge_slashes = False
    for resource in resources.values():
        routes = Routes(resource, Repository(resource, gate), gate, keys)
        app.register_blueprint(routes.blueprint())


class Routes:
    def __init__(self, resource: Resource, repository: Repository, gate: Gate, keys: IdempotencyKeys) -> None:
        self.resource = resource
        self.repository = repository
        self.gate = gate
        self.keys = keys
        self.batch_model = batch.model(resource)

    def blueprint(self) -> Blueprint:
        routes = Blueprint(self.resource.name, __name__, url_prefix=f"/{self.resource.name}")
        routes.before_request(middleware.refuse_other_media_types)

        def route(method: str, rule: str, view: Callable[..., Response]) -> None:
            routes.add_url_rule(rule, view.__name__, view, methods=[method])

        route("GET", "", self.list_rows)
        route("GET", "/count", self.count)
        route("GET", "/<id:row_id>", self.get)
        route("GET", f"/<id:row_id>{HISTORY}", self.history)
        route("POST", "", self.create)
        route("POST", "/batch", self.run_batch)
        route("PUT", "/<id:row_id>", self.put)
        route("PATCH", "/<id:row_id>", self.patch)
        route("DELETE", "/<id:row_id>", self.delete)
        return routes

    # ---- reads ----

    def list_rows(self) -> Response:
        page = requests.page(self.resource)
        try:
            return responses.of_read(self.repository.page(page, requests.from_edge()))
        except BadCursor:
            raise requests.bad_cursor() from None

    def count(self) -> Response:
        page = requests.search(self.resource)
        return responses.of_read(self.repository.count(page, requests.from_edge()))

    def get(self, row_id: int) -> Response:
        requests.parameters()
        return responses.of_read(self.repository.get(row_id, requests.from_edge()))

    def history(self, row_id: int) -> Response:
        page = requests.history_page()
        try:
            return responses.of_read(self.repository.history(row_id, page, requests.from_edge()))
        except BadCursor:
            raise requests.bad_cursor() from None

    # ---- writes ----

    def create(self) -> Response:
        deadline = requests.deadline(self.gate.database.timeout)
        requests.parameters()
        new = requests.body(self.resource.create_model)
        preference = requests.preference()

        def write(connection: Connection) -> Change[StoredResponse]:
            return self._created(self.repository.create(connection, new), preference)

        keyed = self.keys.once(requests.idempotency_key(new), write)
        run = partial(self.gate.write, keyed, deadline=deadline, author=requests.author())
        return responses.of_write(ids.create(self.resource, self.gate, run))

    def _created(self, change: Change[tuple[int, Entry]], preference: str) -> Change[StoredResponse]:
        row_id, entry = change.outcome
        headers = {"Location": self.resource.row_path(row_id).path, "ETag": entry.etag}
        response = StoredResponse(201, {"id": row_id, "message": "Created"}, headers)
        return change.with_outcome(responses.preferred(response, entry, preference))

    def put(self, row_id: int) -> Response:
        return self._create_again(row_id) if expects_no_row() else self._update(row_id, JSON)

    def _create_again(self, row_id: int) -> Response:
        deadline = requests.deadline(self.gate.database.timeout)
        requests.parameters()
        changes = requests.changes(self.resource, JSON, lambda: None)
        preference = requests.preference()

        def write(connection: Connection) -> Change[StoredResponse]:
            self.repository.check_deleted(connection, row_id)
            new = requests.complete(self.resource, changes)
            return self._created(self.repository.create_again(connection, row_id, new), preference)

        paths = self.resource.invalidated_by(row_id)
        return responses.of_write(
            self.gate.write(write, known_paths=paths, deadline=deadline, author=requests.author())
        )

    def patch(self, row_id: int) -> Response:
        return self._update(row_id, MERGE_PATCH)

    def _update(self, row_id: int, types: tuple[str, ...]) -> Response:
        deadline = requests.deadline(self.gate.database.timeout)
        requests.parameters()
        changes = requests.changes(self.resource, types, lambda: self.repository.stored(row_id))
        condition = precondition()
        preference = requests.preference()

        def write(connection: Connection) -> Change[StoredResponse]:
            change = self.repository.update(connection, row_id, changes, condition)
            response = StoredResponse(200, {"message": "Updated"}, {"ETag": change.outcome.etag})
            return change.with_outcome(responses.preferred(response, change.outcome, preference))

        paths = self.resource.invalidated_by(row_id)
        return responses.of_write(
            self.gate.write(write, known_paths=paths, deadline=deadline, author=requests.author())
        )

    def delete(self, row_id: int) -> Response:
        deadline = requests.deadline(self.gate.database.timeout)
        requests.parameters()
        condition = precondition()

        def write(connection: Connection) -> Change[StoredResponse]:
            change = self.repository.delete(connection, row_id, condition)
            return change.with_outcome(StoredResponse(200, {"message": "Deleted"}))

        paths = self.resource.invalidated_by(row_id)
        return responses.of_write(
            self.gate.write(write, known_paths=paths, deadline=deadline, author=requests.author())
        )

    def run_batch(self) -> Response:
        deadline = requests.deadline(self.gate.database.timeout)
        requests.parameters()
        body = requests.body(self.batch_model, limit=MAX_BATCH_BYTES)
        once = partial(self.keys.once, requests.idempotency_key(body))
        preference = requests.preference()
        run = partial(batch.run, self.repository, body, once, deadline, requests.author(), preference)
        return responses.of_write(ids.create(self.resource, self.gate, run))
