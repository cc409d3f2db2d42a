"""The sentences that users read are plain English: no opener and no word that the style guide rules out comes back."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import click
import pytest

from testkit.stack import ROOT
from tests.docs import sources
from velikiy.cli import velikiy
from velikiy.http.edge_config import EDGE_DETAILS
from velikiy.http.problems import DETAILS
from velikiy.openapi.document import document
from velikiy.resources.base import registry
from velikiy.resources.problems import KINDS, SQLSTATES
from velikiy.resources.validation import SENTENCES as FIELDS
from velikiy.stack.commands import run

OPENERS = ("Of", "By", "Under which", "What", "Whether", "Who", "As of")
"""A sentence names its subject first."""

WORDS = {
    "people instead of processes": r"he|him|his|she|her|somebody|nobody|everybody|anybody|whoever|whomever",
    "speech instead of data": r"told|said|heard|asked|spoken",
    "a pronoun instead of a noun": r"those (?:who|that|which)|of those|the former|the latter|is none|are none"
    r"|(?:another|each|every|this|that) one(?=[,.;:)]|$| (?:of|that|which|who|with|is|has)\b)",
    "private dialect": r"broken off|breaks? off|anew|not any more|(?:has|have) to be told",
}

EXCEPTIONS = {
    ".env.example": ("Whether REDIS_URL is an IP address",),  # the meaning of a true/false setting
}
"""Parts of sentences that may stay, by document; each with its reason."""

GENERATED = re.compile(r"<!-- written by [^>]*: begin -->.*?<!-- written by [^>]*: end -->", re.DOTALL)
"""Results of a measurement: their words stand in the code that writes them."""

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "docs/**/*.md", "CONTRIBUTING.md", "SECURITY.md")
    for path in ROOT.glob(pattern)
)

Text = tuple[str, str]
"""Where a text is from, and the text."""


# ---- what is wrong with a text ----


def flaws(text: str, exceptions: tuple[str, ...] = ()) -> list[str]:
    """Return each ruled-out opener and word, with the sentence that contains it."""
    found = []
    for sentence in sentences(text):
        if any(it in sentence for it in exceptions):
            continue
        if opener := next((it for it in OPENERS if re.match(rf"{it}\b", sentence)), None):
            found.append(f"begins with {opener!r}: {sentence}")
        for why, words in WORDS.items():
            found += [f"{why}, {match[0]!r}: {sentence}" for match in re.finditer(rf"\b(?:{words})\b", sentence, re.I)]
    return found


def sentences(text: str) -> Iterator[str]:
    """A sentence ends with its full stop; a list item and a table cell are texts of their own."""
    for paragraph in re.split(r"\n\s*\n|\n\s*(?=[-*+] |\d+\. |[|#])|(?<!\\)\|", text):
        plain = re.sub(r"\s+", " ", re.sub(r"^[\s>#*+-]*(?:\d+\. )?", "", paragraph)).strip()
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z`*(\[])", plain):
            if stripped := sentence.strip(" *_([`"):
                yield stripped


# ---- the texts ----


def problems() -> Iterator[Text]:
    for name, kind in KINDS.items():
        yield f"problem {name}", kind.advice
    for status, sentence in DETAILS.items():
        yield f"status {status}", sentence
    for sqlstate, (_, sentence) in SQLSTATES.items():
        yield f"SQLSTATE {sqlstate}", sentence
    for kind_of_error, sentence in FIELDS.items():
        yield f"field {kind_of_error}", sentence
    for code, sentence in EDGE_DETAILS.items():
        yield f"status {code} of the edge", sentence


def descriptions(part: Any, place: str = "") -> Iterator[Text]:
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key in ("description", "summary", "detail") and isinstance(value, str):
                yield f"{place}/{key}", value
            else:
                yield from descriptions(value, f"{place}/{key}")
    elif isinstance(part, list):
        for index, value in enumerate(part):
            yield from descriptions(value, f"{place}/{index}")


def helps(command: click.Command, name: str) -> Iterator[Text]:
    yield name, command.help or ""
    for parameter in command.params:
        yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""
    if isinstance(command, click.Group):
        for sub in command.commands.values():
            yield from helps(sub, f"{name} {sub.name}")


def comments(file: str) -> str:
    lines = (ROOT / file).read_text().splitlines()
    return "\n".join(line.lstrip("# ") if line.startswith("#") else "" for line in lines)


def prose(file: str) -> str:
    """A document without its code, links' targets, headings, quotations, comments and generated results."""
    text = GENERATED.sub("", (ROOT / file).read_text())
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)  # a heading is no sentence
    text = re.sub(r'"[^"\n]*"', '"..."', re.sub(r"`[^`\n]*`", "`code`", text))
    return re.sub(r"\]\([^)]*\)", "]", text)


def check(texts: Iterator[Text], exceptions: tuple[str, ...] = ()) -> None:
    found, count = [], 0
    for place, text in texts:
        count += 1
        found += [f"{place}: {flaw}" for flaw in flaws(text, exceptions)]
    assert count, "there is no text to check"
    assert not found, "\n".join(found)


# ---- the tests ----


def test_problems_read_as_plain_english() -> None:
    check(problems())


def test_the_openapi_document_reads_as_plain_english() -> None:
    check(descriptions(document(registry())))


@pytest.mark.parametrize(("command", "name"), [(run, "./run"), (velikiy, "velikiy")])
def test_every_help_text_reads_as_plain_english(command: click.Group, name: str) -> None:
    check(helps(command, name))


@pytest.mark.parametrize("file", sources.files())
def test_comments_read_as_plain_english(file: str) -> None:
    text = re.sub(r'"[^"\n]*"', '"..."', re.sub(r"`[^`\n]*`", "`code`", sources.comments(file)))
    check(iter([(file, text)]), EXCEPTIONS.get(file, ()))


def test_the_comments_of_env_example_read_as_plain_english() -> None:
    check(iter([(".env.example", comments(".env.example"))]), EXCEPTIONS[".env.example"])


@pytest.mark.parametrize("file", DOCUMENTS)
def test_documents_read_as_plain_english(file: str) -> None:
    check(iter([(file, prose(file))]), EXCEPTIONS.get(file, ()))


@pytest.mark.parametrize("file", EXCEPTIONS)
def test_an_exception_that_is_no_longer_needed_is_removed(file: str) -> None:
    text = comments(file) if file == ".env.example" else prose(file)
    for part in EXCEPTIONS[file]:
        assert any(part in sentence and flaws(sentence) for sentence in sentences(text)), part


@pytest.mark.parametrize(
    "bad",
    [
        "Of a write the outcome is unknown.",
        "The write failed. What is there has changed.",
        "By which all ways lead.",
        "The resource was changed; somebody else wrote it.",
        "A cache that cannot be told of a write is fenced.",
        "The port is in use, choose another one.",
        "- Whether it holds.",
        "| a | Who waits for it |",
    ],
)
def test_a_ruled_out_sentence_is_found(bad: str) -> None:
    assert flaws(bad)


@pytest.mark.parametrize(
    "good",
    [
        "The outcome of a write is unknown: read before you retry.",
        "Show the processes of the stack. Exits with 0 if the stack is ready, else with 3.",
        "Offline edges do not serve their caches. Bypassed caches are reported.",
    ],
)
def test_plain_sentences_pass(good: str) -> None:
    assert not flaws(good)
