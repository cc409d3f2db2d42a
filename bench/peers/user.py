"""The statements, the rules of a user and the pool of connections that the peers' apps share."""

from typing import Annotated, Any

from psycopg.rows import dict_row
from pydantic import BaseModel, EmailStr, StringConstraints

SELECT = "SELECT id, name, email, created_at, updated_at, version FROM users WHERE id = %s"
UPDATE = "UPDATE users SET name = coalesce(%s, name), email = coalesce(%s, email) WHERE id = %s RETURNING id"

POOL: dict[str, Any] = {
    "kwargs": {"autocommit": True, "row_factory": dict_row},
    "min_size": 1,
    "max_size": 8,
}


class Changes(BaseModel, extra="forbid"):
    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)] | None = None
    email: EmailStr | None = None
