"""Kinds of text that fields are made of: what they take, and how the API's document describes that.

name: Annotated[str, Line(100)]
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import email_validator
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

# "company.local" and "team.test" are names that people run mail on at home; whether one can be reached is
# no question of syntax.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()

CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
BLANK = r"\s\x1c-\x1f\x85"
INVISIBLE = (
    CONTROL
    + r"\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
    + "\ufff0-\ufffb\U000e0000-\U000e0fff"
)
"""As characters of a regular expression: Unicode's Default_Ignorable_Code_Point, and blanks."""

MIXED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "KATAKANA-HIRAGANA", "LATIN"})
"""Scripts that are written together (Unicode TR 39, 5.2, "highly restrictive")."""


PLAIN = re.compile(
    r"(?=[^@]{1,64}@)[a-z0-9_+-]+(\.[a-z0-9_+-]+)*@([a-z0-9](-?[a-z0-9]){0,30}\.)+[a-z]{2,30}", re.ASCII | re.IGNORECASE
)
"""Addresses that need no library to be told valid: most of all, in a thirtieth of its time."""


@dataclass(frozen=True)
class Line:
    """A text in one line, trimmed, with something to see in it."""

    most: int
    """Characters, as they are sent: a schema knows nothing of trimming."""

    def check(self, text: str) -> str:
        """Raises: ValueError"""
        if not 1 <= len(text) <= self.most:
            raise ValueError(f"must have 1 to {self.most} characters; yours has {len(text)}")
        text = _printable(text.strip())
        if not re.search(f"[^{INVISIBLE}]", text):
            raise ValueError("must contain a visible character")
        return text

    @property
    def schema(self) -> dict[str, Any]:
        pattern = f"^[{BLANK}]*[^{CONTROL}]*[^{INVISIBLE}][^{CONTROL}]*[{BLANK}]*$"
        return {"minLength": 1, "maxLength": self.most, "pattern": pattern}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(core), **self.schema}


@dataclass(frozen=True)
class Email(Line):
    """An address as RFC 5321 and RFC 6531 have it; whether mail arrives there is another question."""

    most: int = 254

    def check(self, text: str) -> str:
        """Raises: ValueError"""
        if len(text) > self.most:
            raise ValueError(f"must have at most {self.most} characters; yours has {len(text)}")
        text = _printable(text.strip())
        if PLAIN.fullmatch(text):
            return text
        try:
            address = email_validator.validate_email(text, check_deliverability=False, strict=True)
        except email_validator.EmailNotValidError as error:
            raise ValueError(f"is not an e-mail address: {error}") from None
        if text.isascii() and "xn--" not in text.lower():
            return text
        # Beyond ASCII one mailbox has many spellings (composed or not, full width, Punycode): one of them is kept.
        if len(address.normalized) > self.most:
            length = len(address.normalized)
            raise ValueError(f"must have at most {self.most} characters; its normalized form has {length}")
        for part in address.normalized.replace("@", ".").split("."):
            _of_one_script(part)
        return address.normalized

    @property
    def schema(self) -> dict[str, Any]:
        return {"format": "idn-email", "maxLength": self.most}


def _printable(text: str) -> str:
    if re.search(f"[{CONTROL}]", text):
        raise ValueError("must not contain control characters")
    return text


def _of_one_script(part: str) -> None:
    """An "a" that is Cyrillic makes another mailbox that nobody can tell from the first."""
    letters = [character for character in part if character.isalpha()]
    scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in letters}
    if len(scripts) > 1 and not scripts <= MIXED:
        raise ValueError(
            f"mixes letters of several scripts in {part!r}, which can imitate another address: "
            + ", ".join(sorted(map(str.lower, scripts)))
        )
