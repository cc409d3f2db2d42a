"""Users: a name, and an e-mail address that is unique."""

from typing import Annotated, Any

from pydantic import Field

from velikiy.resources.base import Body, Filter, Resource, Sort
from velikiy.resources.text import BLANK, CONTROL, Email, Line
from velikiy.resources.user_exports import COLUMN_SYNONYMS, KNOWN_EXPORTS


class NewUser(Body):
    name: Annotated[
        str,
        Line(100),
        Field(
            description="1 to 100 characters, trimmed, with at least one visible character.",
            examples=["Alice", "Dora", "Emil", "Alice Adams"],
        ),
    ]
    email: Annotated[
        str,
        Email(),
        Field(
            description="An e-mail address of at most 254 characters, trimmed. It must be unique; case is ignored.",
            examples=["alice@example.com", "dora@example.com", "emil@example.com", "alice.adams@example.com"],
        ),
    ]


def _seed_row(number: int) -> dict[str, Any]:
    first = ("Alice", "Bob", "Charlie", "Dora", "Emil", "Фёдор", "Gita", "Hugo", "Ines", "Jürgen", "Kim")[number % 11]
    last = ("Adams", "Brown", "Cohen", "Диков", "Evans", "Fischer", "García", "Hill", "Ivanov")[number % 9]
    return {"name": f"{first} {last} {number}", "email": f"user{number}@example.com"}


resource = Resource(
    name="users",
    singular="user",
    create_model=NewUser,
    seed_row=_seed_row,
    sort_keys={
        "name": Sort('name COLLATE "und-x-icu"', "text"),
        "email": Sort("folded(email)", "text"),
        "created_at": Sort("created_at", "timestamptz"),
    },
    search_column="words",
    filters={
        "email": Filter(
            "folded(email) = folded(%s)",
            normalize=Email().normalize,
            pattern=f"[^{CONTROL}{BLANK}]{{1,254}}",
            rule="must be an e-mail address of 1 to 254 characters without blanks; write a plus sign as %2B",
            description="An e-mail address. Finds the user who has it, ignoring case.",
        )
    },
    unique={"users_email_caseless": "email"},
    column_synonyms=COLUMN_SYNONYMS,
    known_exports=KNOWN_EXPORTS,
)
