"""The definition of a resource: a table, an address, its fields, and the paths that a write of a row invalidates.

Each resource is one module in velikiy/resources. Everything else (routes, pages, imports, the OpenAPI document) follows
from its `Resource`.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from velikiy.coherence import CachePath
from velikiy.resources.work_limit import without_surplus

READ_ONLY = ("id", "created_at", "updated_at", "version")
"""Columns of every resource that the service sets itself (the SQL procedure make_resource)."""

BATCH_FIELDS = ("op", "id")
"""Members of an operation in a batch, besides the fields of the resource."""

LIST_PARAMETERS = ("cursor", "limit", "q", "sort")
"""The parameters of every list, besides the filters of its resource."""

RESERVED = frozenset({"console", "docs", "health", "livez", "problems", "readyz"})
"""First segments of the service's own addresses. No resource has one of these names, and no edge caches them."""

FILES = frozenset({"openapi.json", "favicon.ico", "robots.txt"})
"""The service's own files. No resource can have such a name."""

NAME = "[a-z][a-z0-9_]{0,40}"
ID = "[1-9][0-9]{0,18}"
"""The shapes of a resource's name and of an id, as regular expressions. The edge recognises paths by the same shapes
(velikiy/http/edge_config.py)."""

HISTORY = "/history"
"""The end of the address of a history, behind the address of its row."""

MAX_ID = 2**63 - 1


def _describe(schema: dict[str, Any]) -> None:
    """Remove pydantic's titles from a JSON schema: they only repeat the names."""
    schema.pop("title", None)
    for property_ in schema["properties"].values():
        property_.pop("title", None)


class Strict(BaseModel):
    """A body that a client sends. Unknown members are refused, and no type is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_describe)

    @model_validator(mode="before")
    @classmethod
    def _accept_whole_floats(cls, data: Any) -> Any:
        """Accept 7.0 as 7: JSON schema does not tell them apart."""
        if isinstance(data, dict):
            members = without_surplus(data, cls.model_fields)
            return {key: int(value) if _is_whole(value) else value for key, value in members.items()}
        return data


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _describe_body(schema: dict[str, Any]) -> None:
    _describe(schema)
    # Not among the properties, so that no generated client offers them.
    ignored = ", ".join(f"`{name}`" for name in READ_ONLY if name not in schema["properties"])
    schema["description"] = f"A row may be sent back as it was read: {ignored} are ignored."


class Body(Strict):
    """Fields of a row. Read-only fields are ignored, so that a client can send back a row as it read it."""

    model_config = ConfigDict(json_schema_extra=_describe_body)

    @model_validator(mode="before")
    @classmethod
    def _ignore_read_only_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key not in READ_ONLY or key in cls.model_fields}
        return data


class Sort(NamedTuple):
    """An order of a list. It needs an index on `(expression, id)`, or each page costs a scan of the table."""

    expression: str
    """SQL over the table's columns; never null."""

    type: str
    """The SQL type of the expression."""


class Filter(NamedTuple):
    """A parameter of a list that finds the rows with one value. Without an index it costs a scan of the table."""

    condition: str
    """SQL over the table's columns with one placeholder: `price = %s`."""

    normalize: Callable[[str], str]
    """Returns the value as a write of a client stores it; unchanged if a write would refuse it."""

    pattern: str
    """A regular expression of a whole value."""

    rule: str
    """The sentence for a value that `pattern` refuses."""

    description: str


class KnownExport(NamedTuple):
    """An export of another program, which an import recognises by its columns."""

    program: str

    columns: frozenset[str]
    """Columns that are in every such export, as `column_key` spells them."""

    synonyms: Mapping[str, tuple[tuple[str, ...], ...]] = {}
    """Columns for a field that mean something else elsewhere, before those of the resource."""

    value_separator: str = ""
    """The text between several values in one cell, of which the first is imported."""


def column_key(name: str) -> str:
    """Return the name of a column without case, blanks and punctuation: "E-mail 1 - Value" is email1value."""
    return "".join(filter(str.isalnum, name.casefold()))


@dataclass(frozen=True)
class Resource:
    name: str
    """The name of the table and the first segment of the address: `users` is /users."""

    singular: str
    """The name of one row in sentences, and a part of its key in Redis: `user`."""

    create_model: type[Body]
    """The fields that clients set, with their rules. The columns have the same names."""

    seed_row: Callable[[int], dict[str, Any]]
    """Returns the fields of the n-th made-up row. No two rows are equal (`velikiy ... seed`)."""

    sort_keys: Mapping[str, Sort] = field(default_factory=dict)
    """The orders of the list by the value of the parameter `sort`, besides `id`."""

    search_column: str | None = None
    """The column that the parameter `q` searches; it contains the result of the SQL function `words()`."""

    filters: Mapping[str, Filter] = field(default_factory=dict)
    """The parameters of the list and of the count that find the rows with one value, by their names."""

    unique: Mapping[str, str] = field(default_factory=dict)
    """Field by the name of its unique index."""

    column_synonyms: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """Columns of other programs for each field, best first, as `column_key` spells them. Several columns are joined."""

    known_exports: tuple[KnownExport, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name) or self.name in RESERVED:
            raise ValueError(f"{self.name!r} is not allowed as the name of a resource")
        if taken := set(self.create_model.model_fields) & {*READ_ONLY, *BATCH_FIELDS}:
            raise ValueError(f"{self.name}: reserved names of fields: {', '.join(sorted(taken))}")
        if taken := set(self.filters) & {*LIST_PARAMETERS}:
            raise ValueError(f"{self.name}: reserved names of parameters: {', '.join(sorted(taken))}")

    # ---- its paths ----

    @property
    def list_path(self) -> CachePath:
        return CachePath(f"/{self.name}", f"all_{self.name}")

    @property
    def count_path(self) -> CachePath:
        return CachePath(f"/{self.name}/count", f"count_{self.name}")

    def row_path(self, row_id: int) -> CachePath:
        return CachePath(f"/{self.name}/{row_id}", f"{self.singular}:{row_id}")

    def history_address(self, row_id: int) -> str:
        """Return the address of a row's history. It belongs to the path of the row: whatever changes the history of a
        row invalidates the row anyway, and a write need not lock and drop a further path."""
        return self.row_path(row_id).path + HISTORY

    def invalidated_by(self, *row_ids: int) -> tuple[CachePath, ...]:
        """Return the paths that creating, updating or deleting these rows invalidates. A row's path may hold a 404."""
        return (*map(self.row_path, row_ids), self.list_path, self.count_path)

    # ---- its shapes ----

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.create_model.model_fields)

    @property
    def columns(self) -> tuple[str, ...]:
        """The members of a row that clients see, in this order."""
        return ("id", *self.fields, "created_at", "updated_at", "version")

    @cached_property
    def update_model(self) -> type[Body]:
        """The same fields, each optional and at least one given. An absent field keeps its value."""
        fields: dict[str, Any] = {}
        for name, information in self.create_model.model_fields.items():
            kind: Any = Annotated[(information.annotation, *information.metadata)]
            fields[name] = (kind, Field(None, description=information.description, examples=information.examples))
        return create_model(f"{self.title}Changes", __base__=_Changes, **fields)

    def example(self, number: int) -> dict[str, Any]:
        """Return this example of each field, counted from 0, or its last one."""
        fields = self.create_model.model_fields.items()
        return {name: field.examples[: number + 1][-1] for name, field in fields if field.examples}

    @property
    def title(self) -> str:
        return self.singular.capitalize()


def _describe_changes(schema: dict[str, Any]) -> None:
    _describe_body(schema)
    schema["description"] = f"At least one field. Absent fields keep their values. {schema['description']}"
    for name, property_ in schema["properties"].items():
        if name not in BATCH_FIELDS:
            del property_["default"]  # absent is not null
    # The number of members, and no `anyOf` of required fields: generators of clients make no type of that.
    schema["minProperties"] = len(schema.get("required", ())) + 1


class _Changes(Body):
    model_config = ConfigDict(json_schema_extra=_describe_changes)

    @model_validator(mode="after")
    def _require_a_change(self) -> "_Changes":
        changeable = [name for name in type(self).model_fields if name not in BATCH_FIELDS]
        if not self.model_fields_set.intersection(changeable):
            raise ValueError(f"must contain at least one of {', '.join(changeable)}")
        return self


@cache
def registry() -> dict[str, Resource]:
    """Return every resource by its name: the attribute `resource` of each module in velikiy/resources that has one."""
    import velikiy.resources

    modules = sorted(module.name for module in pkgutil.iter_modules(velikiy.resources.__path__))
    loaded = [importlib.import_module(f"velikiy.resources.{name}") for name in modules]
    resources: list[Resource] = [module.resource for module in loaded if hasattr(module, "resource")]
    singulars = [resource.singular for resource in resources]
    if twice := {singular for singular in singulars if singulars.count(singular) > 1}:
        raise ValueError(f"two resources have the singular {', '.join(twice)}, so their keys in Redis would collide")
    return {resource.name: resource for resource in resources}


def path_of(address: str) -> CachePath | None:
    """Return the path of an address as clients spell it, without its query; None if nothing is cached there."""
    spelled = re.fullmatch(f"/({NAME})(?:/(count|({ID})({HISTORY})?))?", address.partition("?")[0])
    resource = registry().get(spelled[1]) if spelled else None
    if not spelled or not resource:
        return None
    if not spelled[2]:
        return resource.list_path
    return resource.row_path(int(spelled[3])) if spelled[3] else resource.count_path
