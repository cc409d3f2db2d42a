"""What a resource is: a table, an address, and what may be asked of it. Each module in velikiy/resources holds one;
what is true of all of them stands here and in rows.py, api.py, transfer.py and openapi.py."""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from velikiy.coherence import CachePath

READ_ONLY = ("id", "created_at", "updated_at", "version")
"""Columns of every resource that the service sets itself (migrations: make_resource)."""

OF_A_BATCH = ("op", "id")
"""What an operation of a batch has besides the fields."""

RESERVED = frozenset({"health", "livez", "readyz", "docs", "problems"})
"""Addresses of the service's own; edge/nginx.conf leaves them uncached."""


def _describe(schema: dict[str, Any]) -> None:
    """JSON schemas without pydantic's titles, which only repeat the names."""
    schema.pop("title", None)
    for described in schema["properties"].values():
        described.pop("title", None)


class Strict(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_describe)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, data: Any) -> Any:
        """7.0 is one, and to JSON schema the same as 7."""
        if isinstance(data, dict):
            return {key: int(value) if _is_whole(value) else value for key, value in data.items()}
        return data


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _describe_body(schema: dict[str, Any]) -> None:
    _describe(schema)
    for name in READ_ONLY:
        schema["properties"].setdefault(
            name, {"description": "Ignored, so that a row can be sent back as it was read."}
        )


class Body(Strict):
    """A row, or some of it. Read-only fields are accepted and ignored, so that what was read can be sent back."""

    model_config = ConfigDict(json_schema_extra=_describe_body)

    @model_validator(mode="before")
    @classmethod
    def _without_read_only_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key not in READ_ONLY or key in cls.model_fields}
        return data


class Sort(NamedTuple):
    """What a list may be sorted by. It needs an index on `(expression, id)`, or each page costs a whole table."""

    expression: str
    """SQL, of the table's columns; never null."""

    type: str
    """Of the expression, in SQL."""


@dataclass(frozen=True)
class Resource:
    name: str
    """Of the address and of the table: `users` is /users."""

    one: str
    """As sentences call one of them: `user`."""

    new: type[Body]
    """The fields that clients set, with their rules; they are columns of the same names."""

    sample: Callable[[int], dict[str, Any]]
    """The n-th new one of any number that are all different (`velikiy ... seed`)."""

    sorts: Mapping[str, Sort] = field(default_factory=dict)
    """By parameter, besides `id`."""

    words: str | None = None
    """The column that `q` searches; its words are as the SQL function `words()` makes them."""

    unique: Mapping[str, str] = field(default_factory=dict)
    """Field by the name of its unique index."""

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z][a-z0-9_]{0,40}", self.name) or self.name in RESERVED:
            raise ValueError(f"{self.name!r} is not allowed as the name of a resource")
        if taken := set(self.new.model_fields) & {*READ_ONLY, *OF_A_BATCH}:
            raise ValueError(f"{self.name}: reserved names of fields: {', '.join(sorted(taken))}")

    # ---- what a write touches, and what a read depends on ----

    @property
    def all(self) -> CachePath:
        return CachePath(f"/{self.name}", f"all_{self.name}")

    @property
    def count(self) -> CachePath:
        return CachePath(f"/{self.name}/count", f"count_{self.name}")

    def item(self, number: int) -> CachePath:
        return CachePath(f"/{self.name}/{number}", f"{self.one}:{number}")

    def invalidated_by(self, *numbers: int) -> tuple[CachePath, ...]:
        """What creating, updating and deleting these invalidates; a stored 404 of one counts."""
        return (*map(self.item, numbers), self.all, self.count)

    # ---- its shapes ----

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.new.model_fields)

    @property
    def columns(self) -> tuple[str, ...]:
        """As clients see them, in this order."""
        return ("id", *self.fields, "created_at", "updated_at", "version")

    @cached_property
    def changes(self) -> type[Body]:
        """Any of the fields, at least one; what is absent stays."""
        fields: dict[str, Any] = {}
        for name, information in self.new.model_fields.items():
            kind: Any = Annotated[(information.annotation, *information.metadata)]
            fields[name] = (kind, Field(None, description=information.description, examples=information.examples))
        return create_model(f"{self.title}Changes", __base__=_Changes, **fields)

    @property
    def example(self) -> dict[str, Any]:
        """Of a new one: the first example of each field."""
        return {name: field.examples[0] for name, field in self.new.model_fields.items() if field.examples}

    @property
    def title(self) -> str:
        return self.one.capitalize()


def _describe_changes(schema: dict[str, Any]) -> None:
    _describe_body(schema)
    changeable = [name for name in schema["properties"] if name not in (*READ_ONLY, *OF_A_BATCH)]
    for name in changeable:
        del schema["properties"][name]["default"]  # absent is not null
    schema["anyOf"] = [{"required": [name]} for name in changeable]


class _Changes(Body):
    model_config = ConfigDict(json_schema_extra=_describe_changes)

    @model_validator(mode="after")
    def _something_to_change(self) -> "_Changes":
        changeable = [name for name in type(self).model_fields if name not in OF_A_BATCH]
        if not self.model_fields_set.intersection(changeable):
            raise ValueError(f"must contain at least one of {', '.join(changeable)}")
        return self


@cache
def registry() -> dict[str, Resource]:
    """Those that there are, by name: each module in velikiy/resources has one, called `resource`."""
    import velikiy.resources

    modules = sorted(module.name for module in pkgutil.iter_modules(velikiy.resources.__path__))
    loaded = [importlib.import_module(f"velikiy.resources.{name}") for name in modules]
    found: list[Resource] = [module.resource for module in loaded if hasattr(module, "resource")]
    if twice := {it.one for it in found if [other.one for other in found].count(it.one) > 1}:
        raise ValueError(f"two resources have the singular {', '.join(twice)}, so their keys in Redis would collide")
    return {resource.name: resource for resource in found}


def path_of(address: str) -> CachePath | None:
    """Of an address as clients spell it, its parameters left aside; None where nothing is cached."""
    spelled = re.fullmatch("/([a-z][a-z0-9_]*)(?:/(count|[1-9][0-9]{0,18}))?", address.partition("?")[0])
    resource = registry().get(spelled[1]) if spelled else None
    if not spelled or not resource:
        return None
    if not spelled[2]:
        return resource.all
    return resource.count if spelled[2] == "count" else resource.item(int(spelled[2]))
