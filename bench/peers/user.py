"""What the peers' apps have in common: the same statements and the same rules of a user."""

from typing import Annotated

from pydantic import BaseModel, EmailStr, StringConstraints

SELECT = "SELECT id, name, email, created_at, updated_at, version FROM users WHERE id = %s"
UPDATE = "UPDATE users SET name = coalesce(%s, name), email = coalesce(%s, email) WHERE id = %s RETURNING id"


class Changes(BaseModel, extra="forbid"):
    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)] | None = None
    email: EmailStr | None = None
