"""Findings about names and values of settings."""

import difflib
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from dotenv import dotenv_values
from pydantic_settings import BaseSettings

from velikiy.findings import Finding
from velikiy.settings import BadSetting, MigrationSettings, Settings, StackSettings, load

DOCKER_NAMES = (
    "IMAGE_TAG",
    "POSTGRES_IMAGE",
    "REDIS_IMAGE",
    "PROMETHEUS_IMAGE",
    "PYTHON_IMAGE",
    "DEBIAN_IMAGE",
    "TLS_FOLDER",
    "HTTPS_PORT",
)
"""The further names that compose.yaml reads."""

OTHER_PREFIXES = ("COMPOSE_", "DOCKER_", "BUILDKIT_", "PG", "OTEL_")
"""The beginnings of names that other programs read from the same file or environment."""

OTHER_NAMES = (
    "TZ",
    "TMPDIR",
    "LANG",
    "SECRETS_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "PATH",
    "HOME",
)


SHORT_EDGE_TTL_S = 60


def known_names() -> set[str]:
    fields = {name.upper() for kind in (Settings, StackSettings, MigrationSettings) for name in kind.model_fields}
    return fields | {*DOCKER_NAMES}


def unknown_names(names: Iterable[str], source: str = ".env") -> list[Finding]:
    """Return the names that no part of the service reads. Upper and lower case do not differ, as for pydantic."""
    known = known_names()
    found = []
    for name in names:
        if name.upper() in known or name.upper() in OTHER_NAMES or name.upper().startswith(OTHER_PREFIXES):
            continue
        near = difflib.get_close_matches(name.upper().replace("-", "_"), sorted(known), n=1, cutoff=0.7)
        advice = f"Did you mean {near[0]}?" if near else "Remove it. .env.example has all names."
        found.append(
            Finding("settings.unknown", f"{name} in {source} is no setting, so it has no effect.", advice, wrong=False)
        )
    return found


def unknown_in(file: Path) -> list[Finding]:
    """Return the unknown names in a file of settings; none if the file cannot be read, which is reported elsewhere."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return unknown_names(dotenv_values(stream=stream, interpolate=False), file.name)
    except OSError:
        return []


def unapplied(name: str, wanted: str, running: str | None) -> Finding:
    return Finding(
        "settings.unapplied",
        f"{name}={wanted} is set, but the stack runs with {name}={running or '(the default)'}.",
        "Run ./run up --detach, which applies it.",
        wrong=False,
    )


def refused(sentence: str) -> Finding:
    return Finding("settings.refused", sentence, "docs/configuration.md has all settings.")


def all_refused(kinds: Iterable[type[BaseSettings]]) -> list[Finding]:
    """Return a finding for each bad value in these kinds of settings."""
    sentences: dict[str, None] = {}  # a set that keeps its order: kinds share settings
    for kind in kinds:
        try:
            load(kind)
        except BadSetting as bad:
            sentences |= dict.fromkeys(str(bad).splitlines())
    return [refused(sentence) for sentence in sentences]


def hints(settings: Settings) -> Iterator[str]:
    """Yield advice about settings with which nothing is wrong."""
    if settings.edge_ttl < SHORT_EDGE_TTL_S:
        yield (
            f"EDGE_TTL={settings.edge_ttl}: an edge requests an unchanged response again after {settings.edge_ttl} s."
            " A longer time, such as EDGE_TTL=3600, saves these requests and makes no read older: a write invalidates"
            " its entries before it commits (docs/configuration.md, Lifetime of cached responses)."
        )


def open_secret(file: Path) -> Finding:
    return Finding(
        "secrets.open",
        f"Other users of this machine can read or replace {file}.",
        f"Close it: chmod go-rwx {shlex.quote(str(file))}",
    )
