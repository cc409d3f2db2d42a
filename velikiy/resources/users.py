"""Users: a name and an e-mail that no other user has."""

import unicodedata
from typing import Annotated, Any

import email_validator
from pydantic import AfterValidator, Field

from velikiy.resource import Body, Resource, Sort

# "company.local" and "team.test" are names that people run mail on at home; whether one can be reached is
# no question of syntax.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()

MIXED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "KATAKANA-HIRAGANA", "LATIN"})
"""Scripts that are written together (Unicode TR 39, 5.2, "highly restrictive")."""


def _printable(text: str) -> str:
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise ValueError("must not contain control characters")
    return text


def _name(text: str) -> str:
    text = _printable(text.strip())
    if not 1 <= len(text) <= 100:
        raise ValueError("must have 1 to 100 characters")
    if not any(unicodedata.category(character)[0] in "LNPS" for character in text):
        raise ValueError("must have a character that can be seen")
    return text


def _email(text: str) -> str:
    text = _printable(text.strip())
    if len(text) > 254:
        raise ValueError("must have at most 254 characters")
    try:
        address = email_validator.validate_email(text, check_deliverability=False, strict=True)
    except email_validator.EmailNotValidError as error:
        raise ValueError(f"is not an e-mail address: {error}") from None
    if text.isascii() and "xn--" not in text.lower():
        return text
    # Beyond ASCII one mailbox has many spellings (composed or not, full width, Punycode): one of them is kept.
    if len(address.normalized) > 254:
        raise ValueError("must have at most 254 characters")
    for part in address.normalized.replace("@", ".").split("."):
        _of_one_script(part)
    return address.normalized


def _of_one_script(part: str) -> None:
    """An "a" that is Cyrillic makes another mailbox that nobody can tell from the first."""
    letters = [character for character in part if character.isalpha()]
    scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in letters}
    if len(scripts) > 1 and not scripts <= MIXED:
        raise ValueError(f"mixes letters of several scripts in {part!r}: {', '.join(sorted(map(str.lower, scripts)))}")


class NewUser(Body):
    name: Annotated[
        str,
        AfterValidator(_name),
        Field(description="1 to 100 characters, trimmed, at least one that can be seen.", examples=["Alice"]),
    ]
    email: Annotated[
        str,
        AfterValidator(_email),
        Field(
            description="An address of at most 254 characters, trimmed; unique whatever the case of its letters.",
            examples=["alice@example.com"],
        ),
    ]


def _sample(number: int) -> dict[str, Any]:
    first = ("Alice", "Bob", "Charlie", "Dora", "Emil", "Фёдор", "Gita", "Hugo", "Ines", "Jürgen", "Kim")[number % 11]
    last = ("Adams", "Brown", "Cohen", "Диков", "Evans", "Fischer", "García", "Hill", "Ivanov")[number % 9]
    return {"name": f"{first} {last} {number}", "email": f"user{number}@example.com"}


resource = Resource(
    name="users",
    one="user",
    new=NewUser,
    example={"name": "Alice", "email": "alice@example.com"},
    sample=_sample,
    sorts={
        "name": Sort('name COLLATE "und-x-icu"', "text"),
        "email": Sort("lower(email)", "text"),
        "created_at": Sort("created_at", "timestamptz"),
    },
    words="words",
    unique={"users_email_caseless": "email"},
)
