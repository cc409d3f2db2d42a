"""Write an exception for the log: the traceback as Python prints it, without values.

A message may quote a row: `KeyError: 'anna@example.com'`. A word of it stays if the code of the traceback contains it,
or if it is a plain lower-case word; other words become "…". Values of local variables are left out.
"""

import builtins
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

PACKAGE = f"{Path(__file__).parent}/"

MAX_FRAMES = 20
MAX_CHAIN = 5
"""Exceptions that are shown of a chain of causes."""

MAX_MESSAGE = 300
"""Characters."""

QUOTED_OR_WORD = re.compile(r"'[^']*'|\"[^\"]*\"|\S+")
PLAIN = re.compile(r"[a-z]+(['-][a-z]+)*|\d{1,5}|\W+")
TYPES = {"NoneType", *(name for name, value in vars(builtins).items() if isinstance(value, type))}
CAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"


def render(exc_info: tuple[Any, BaseException | None, TracebackType | None]) -> str:
    """Return the traceback of the exception and of its causes."""
    kind, error, trace = exc_info
    if error is None:  # logged outside of an `except`, or an exception without a value (sys.unraisablehook)
        return kind.__name__ if kind else ""
    return "".join(_parts(error, trace, MAX_CHAIN)).rstrip("\n")


def _parts(error: BaseException, trace: TracebackType | None, chain: int) -> Iterator[str]:
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and chain > 1:
        yield from _parts(before, before.__traceback__, chain - 1)
        yield CAUSE if error.__cause__ else CONTEXT
    if trace is not None:
        yield "Traceback (most recent call last):\n"
        yield from traceback.format_list(traceback.extract_tb(trace, limit=-MAX_FRAMES))
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    text = message(error, trace)
    yield f"{name}: {text}\n" if text else f"{name}\n"
    if isinstance(error, BaseExceptionGroup) and chain > 1:
        for part in error.exceptions[:MAX_CHAIN]:
            yield from _parts(part, part.__traceback__, 1)


def sender(error: BaseException) -> str:
    """Return the file, line and function that sent a failed statement to PostgreSQL, or an empty string."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = frame.filename.removeprefix(PACKAGE)
        if file != frame.filename and not file.startswith("postgres/"):
            return f"velikiy/{file}:{frame.lineno} {frame.name}"
    return ""


def message(error: BaseException, trace: TracebackType | None = None) -> str:
    """Return the first line of the exception's message, without values."""
    if isinstance(error, OSError) and error.strerror:
        return f"[Errno {error.errno}] {error.strerror}"  # the text that follows names a file or a host
    known = set(TYPES)
    diagnostic = getattr(error, "diag", None)  # of a psycopg.Error; its further lines quote the row
    text = getattr(diagnostic, "message_primary", None)
    for name in ("constraint_name", "table_name", "column_name", "schema_name"):
        known |= set(_words(getattr(diagnostic, name, None) or ""))
    for frame, _ in traceback.walk_tb(trace or error.__traceback__):
        known |= _words_of_code(frame.f_code)
    try:
        text = text or str(error)
    except Exception:  # an exception whose message cannot be made must not hide the exception
        return ""
    line = text.partition("\n")[0][:MAX_MESSAGE]
    return QUOTED_OR_WORD.sub(lambda match: _without_values(match[0], known), line)


def _without_values(token: str, known: set[str]) -> str:
    if token[0] in "'\"" and token[-1] == token[0] and len(token) > 1:
        return token if set(_words(token)) <= known else f"{token[0]}…{token[0]}"
    word = token.strip(".,:;!?()[]{}<>")
    return token if not word or PLAIN.fullmatch(word) or set(_words(word)) <= known else "…"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _words_of_code(code: CodeType) -> set[str]:
    """Return the names and the words of the constants of a function."""
    found = {*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars}
    for constant in code.co_consts:
        for text in constant if isinstance(constant, tuple | frozenset) else (constant,):
            if isinstance(text, str):
                found |= set(_words(text))
    return found
