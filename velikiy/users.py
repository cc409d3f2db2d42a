"""Users: what each operation reads, and which paths each write touches.

A row becomes JSON once, in PostgreSQL; from there to the client its bytes are passed on unparsed.
"""

import base64
import binascii
import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import email_validator
import psycopg
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from velikiy.coherence import Answer, Change, Entry, Fence, Path
from velikiy.postgres import Connection

# "company.local" and "team.test" are names that people run mail on at home; whether one can be reached is
# no question of syntax.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()

T = TypeVar("T")

ALL = Path("/users", "all_users")
PAGE = 1000
"""Users on one page of the list, and on the first page when nobody asks for less."""

READ_ONLY = ("id", "created_at", "updated_at", "version")


def one(user_id: int) -> Path:
    return Path(f"/users/{user_id}", f"user:{user_id}")


def path_of(address: str) -> Path | None:
    """Of an address as clients spell it, its parameters left aside; None where nothing is cached."""
    path = address.partition("?")[0]
    if path == ALL.path:
        return ALL
    number = path.removeprefix("/users/")
    return one(int(number)) if f"/users/{number}" == path and re.fullmatch("[1-9][0-9]{0,18}", number) else None


def touched_by(user_id: int) -> tuple[Path, ...]:
    """What create, update and delete of a user invalidate; a stored 404 of it counts."""
    return (one(user_id), ALL)


class EmailTaken(Exception):
    """Another user has this e-mail, compared case-insensitively."""


class BadCursor(ValueError):
    """A cursor that this service did not make."""


# ---- what comes in ----


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
    return address.normalized


Name = Annotated[str, AfterValidator(_name)]
Email = Annotated[str, AfterValidator(_email)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _read_only_fields_are_ignored(cls, data: Any) -> Any:
        """So that what was read can be sent back."""
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key not in READ_ONLY}
        return data


class NewUser(_Body):
    name: Name
    email: Email


class Changes(_Body):
    """Any of the fields; an absent one stays, null is no value."""

    name: Name = Field(default="", validate_default=False)
    email: Email = Field(default="", validate_default=False)

    @model_validator(mode="after")
    def _something_to_change(self) -> "Changes":
        if not self.model_fields_set:
            raise ValueError("nothing to change: give a name, an email or both")
        return self


# ---- the operations ----

SELECT_ONE = """
    SELECT row_to_json(u)::text
    FROM (SELECT id, name, email, created_at, updated_at, version FROM users WHERE id = %s) u
"""
SELECT_PAGE = """
    SELECT id, row_to_json(u)::text
    FROM (SELECT id, name, email, created_at, updated_at, version FROM users WHERE id > %s ORDER BY id LIMIT %s) u
"""
# The writes give the row as the reads do: the writer fills Redis with it.
INSERT = """
    WITH u AS (
        INSERT INTO users (name, email) VALUES (%s, %s)
        RETURNING id, name, email, created_at, updated_at, version
    )
    SELECT id, row_to_json(u)::text FROM u
"""
UPDATE = """
    WITH u AS (
        UPDATE users SET name = coalesce(%s, name), email = coalesce(%s, email) WHERE id = %s
        RETURNING id, name, email, created_at, updated_at, version
    )
    SELECT row_to_json(u)::text FROM u
"""
DELETE = "DELETE FROM users WHERE id = %s RETURNING id"


class Users:
    def __init__(self, fence: Fence) -> None:
        self.fence = fence

    def get(self, user_id: int) -> Answer:
        """The user as a JSON object, or an entry with status 404."""

        def load(connection: Connection) -> Entry:
            row = connection.execute(SELECT_ONE, (user_id,)).fetchone()
            return Entry(200, row[0].encode()) if row else Entry(404)

        return self.fence.read(one(user_id), "", load)

    def page(self, cursor: str | None, limit: int) -> Answer:
        """Up to `limit` users by id as a JSON array, with a link to the next page where there is one.

        Raises:
            BadCursor
        """
        after = _after(cursor)

        def load(connection: Connection) -> Entry:
            # One more than the page: is there a next one?
            rows = connection.execute(SELECT_PAGE, (after, limit + 1)).fetchall()
            page = rows[:limit]
            link = ""
            if len(rows) > limit:
                size = "" if limit == PAGE else f"&limit={limit}"
                link = f'</users?cursor={_cursor(page[-1][0])}{size}>; rel="next"'
            return Entry(200, f"[{','.join(row[1] for row in page)}]".encode(), link)

        variant = "" if (after, limit) == (0, PAGE) else f"cursor={after}&limit={limit}"
        return self.fence.read(ALL, variant, load)

    def create(self, user: NewUser) -> int:
        """The new user's id.

        Raises:
            EmailTaken
        """

        def change(connection: Connection) -> Change[int]:
            row = connection.execute(INSERT, (user.name, user.email)).fetchone()
            assert row is not None  # INSERT ... RETURNING gives a row or raises
            return _changed(row[0], row[0], Entry(200, row[1].encode()))

        return self._write(change)

    def update(self, user_id: int, changes: Changes) -> bool:
        """False where there is no such user.

        Raises:
            EmailTaken
        """
        fields = changes.model_fields_set

        def change(connection: Connection) -> Change[bool]:
            name = changes.name if "name" in fields else None
            email = changes.email if "email" in fields else None
            row = connection.execute(UPDATE, (name, email, user_id)).fetchone()
            return _changed(True, user_id, Entry(200, row[0].encode())) if row else Change(False)

        return self._write(change)

    def delete(self, user_id: int) -> bool:
        """False where there is no such user."""

        def change(connection: Connection) -> Change[bool]:
            row = connection.execute(DELETE, (user_id,)).fetchone()
            return _changed(True, user_id, Entry(404)) if row else Change(False)

        return self._write(change)

    def _write(self, change: Callable[[Connection], Change[T]]) -> T:
        try:
            return self.fence.write(change)
        except psycopg.errors.UniqueViolation as error:
            if "email" in (error.diag.constraint_name or ""):
                raise EmailTaken from None
            raise


def _changed(outcome: T, user_id: int, entry: Entry) -> Change[T]:
    return Change(outcome, touched_by(user_id), (one(user_id), entry))


# ---- cursors: opaque to clients, so that what they hold can change ----


def _cursor(user_id: int) -> str:
    return base64.urlsafe_b64encode(b"id:%d" % user_id).rstrip(b"=").decode()


def _after(cursor: str | None) -> int:
    """The id after which the page starts."""
    if cursor is None:
        return 0
    try:
        kind, _, number = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).partition(b":")
        after = int(number)
    except (ValueError, binascii.Error):
        raise BadCursor from None
    # The spelling that we make and no other: base64 and int() accept many for one cursor.
    if kind != b"id" or not 0 < after < 2**63 or _cursor(after) != cursor:
        raise BadCursor
    return after
