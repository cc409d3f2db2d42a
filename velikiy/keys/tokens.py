"""The token of an API key: the text that its owner keeps and sends. The service stores only a digest of it.

A token has a prefix and a checksum, so that programs that look for leaked secrets recognise it (`PATTERN`), and so that
a mistyped token is refused without a look-up. Its random part is too long to be guessed, so a plain digest protects it:
slow digests protect texts that people choose.
"""

import hashlib
import re
import secrets
import string
import zlib
from base64 import urlsafe_b64encode

PREFIX = "vk_"

RANDOM_CHARACTERS = 32
"""190 random bits."""

PATTERN = f"{PREFIX}[0-9A-Za-z]{{{RANDOM_CHARACTERS}}}_[0-9a-f]{{8}}"
"""The form of a token, as a regular expression."""

DIGEST = "[0-9A-Za-z_-]{43}"
"""The form of a digest. The edge computes it as well (edge/lua/keys.lua)."""

SHOWN_CHARACTERS = 8
"""The beginning of a token, by which its owner recognises it in a list."""

_ALPHABET = string.ascii_letters + string.digits


def new() -> str:
    """Return a token that was never used."""
    text = PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(RANDOM_CHARACTERS))
    return f"{text}_{_checksum(text)}"


def is_well_formed(token: str) -> bool:
    """Return whether the text has the form of a token and the right checksum."""
    text, _, checksum = token.rpartition("_")
    return re.fullmatch(PATTERN, token) is not None and checksum == _checksum(text)


def digest(token: str) -> str:
    """Return the SHA-256 digest in base64url."""
    return urlsafe_b64encode(hashlib.sha256(token.encode()).digest()).decode().rstrip("=")


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
