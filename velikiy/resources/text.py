"""Types of text for the fields of a resource: the rule of each, and its description in the OpenAPI document.

name: Annotated[str, Line(100)]
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import email_validator
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from velikiy.resources.work_limit import begin_slow_check

# People run mail on names such as "company.local" and "team.test". Syntax does not show whether a name can be reached.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()

CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
BLANK = r"\s\x1c-\x1f\x85"
SHORT_INVISIBLE = (
    CONTROL
    + r"\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
    + r"\ufff0-\ufffb"
)
"""The part of INVISIBLE that any tool can read. JavaScript counts a longer character as two, and fails at a range of
such characters, unless the program says otherwise; generated clients do not."""

INVISIBLE = SHORT_INVISIBLE + r"\U000e0000-\U000e0fff"
"""Characters of a regular expression: Unicode's Default_Ignorable_Code_Point, control characters and blanks."""

COMBINABLE_SCRIPTS = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "KATAKANA-HIRAGANA", "LATIN"})
"""Scripts that are written together (Unicode TR 39, 5.2, "highly restrictive")."""

PLAIN = re.compile(
    r"(?=[^@]{1,64}@)[a-z0-9_+-]+(\.[a-z0-9_+-]+)*@([a-z0-9](-?[a-z0-9]){0,30}\.)+[a-z]{2,30}", re.ASCII | re.IGNORECASE
)
"""Addresses that are valid for certain. Most addresses match, in a thirtieth of the time that the library takes."""


@dataclass(frozen=True)
class Line:
    """A text in one line, trimmed, with at least one visible character."""

    max_length: int
    """Characters before trimming, because a JSON schema knows no trimming."""

    def check(self, text: str) -> str:
        """Raises: ValueError"""
        if not 1 <= len(text) <= self.max_length:
            raise ValueError(f"must have 1 to {self.max_length} characters; yours has {len(text)}")
        text = _check_controls(text.strip())
        if not re.search(f"[^{INVISIBLE}]", text):
            raise ValueError("must contain a visible character")
        return text

    @property
    def schema(self) -> dict[str, Any]:
        pattern = f"^[{BLANK}]*[^{CONTROL}]*[^{SHORT_INVISIBLE}][^{CONTROL}]*[{BLANK}]*$"
        return {"minLength": 1, "maxLength": self.max_length, "pattern": pattern}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(core), **self.schema}


@dataclass(frozen=True)
class Email(Line):
    """An e-mail address by RFC 5321 and RFC 6531. Nothing is sent to it."""

    max_length: int = 254

    def check(self, text: str) -> str:
        """Raises: ValueError"""
        if len(text) > self.max_length:
            raise ValueError(f"must have at most {self.max_length} characters; yours has {len(text)}")
        text = _check_controls(text.strip())
        if PLAIN.fullmatch(text):
            return text
        is_ascii = text.isascii() and "xn--" not in text.lower()
        if not is_ascii:
            begin_slow_check()
        try:
            address = email_validator.validate_email(text, check_deliverability=False, strict=True)
        except email_validator.EmailNotValidError as error:
            raise ValueError(f"is not an e-mail address: {error}") from None
        if is_ascii:
            return text
        # Beyond ASCII, one mailbox has many spellings (composed or not, full width, Punycode). One of them is stored.
        if len(address.normalized) > self.max_length:
            length = len(address.normalized)
            raise ValueError(f"must have at most {self.max_length} characters; its normalized form has {length}")
        for part in address.normalized.replace("@", ".").split("."):
            _check_script(part)
        return address.normalized

    def normalize(self, text: str) -> str:
        """Return the address as `check` stores it, or unchanged if `check` refuses it."""
        try:
            return self.check(text)
        except ValueError:
            return text

    @property
    def schema(self) -> dict[str, Any]:
        return {"format": "idn-email", "maxLength": self.max_length}


def _check_controls(text: str) -> str:
    if re.search(f"[{CONTROL}]", text):
        raise ValueError("must not contain control characters")
    return text


def _check_script(part: str) -> None:
    """Refuse look-alikes: a Cyrillic "a" makes another mailbox that people cannot tell from the first."""
    letters = [character for character in part if character.isalpha()]
    scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in letters}
    if len(scripts) > 1 and not scripts <= COMBINABLE_SCRIPTS:
        raise ValueError(
            f"mixes letters of several scripts in {part!r}, which can imitate another address: "
            + ", ".join(sorted(map(str.lower, scripts)))
        )
