"""The comments and docstrings of the code, as texts."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

from testkit.stack import ROOT

MARKS = {".py": "#", ".sh": "#", ".lua": "--", ".sql": "--", ".conf": "#", ".yaml": "#", ".toml": "#"}
"""The beginning of a comment by the suffix of the file; `#` in files without one of them."""

WITHOUT_SUFFIX = ("run", "edge/start", ".ci/run", "Dockerfile", "edge/Dockerfile")

NOT_OURS = ("tests/docs/test_language.py", "tests/postgres/before_the_baseline.sql")
"""A list of the words that are ruled out, and a dump."""


def files() -> list[str]:
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    return [
        name
        for name in listed
        if (Path(name).suffix in MARKS or name in WITHOUT_SUFFIX) and name not in NOT_OURS and (ROOT / name).is_file()
    ]


def comments(name: str) -> str:
    """Return the comments and docstrings of a file; an empty line separates two that do not belong together."""
    text = (ROOT / name).read_text()
    found = _of_python(text) if name.endswith(".py") else _of_lines(text, MARKS.get(Path(name).suffix, "#"))
    return "\n\n".join(_plain(comment) for comment in found)


def _plain(comment: str) -> str:
    """Remove code: indented blocks, and quoted names."""
    lines = [line for line in comment.splitlines() if not line.startswith("    ")]
    return "\n".join(lines)


def _of_python(text: str) -> Iterator[str]:
    lines = iter(tokenize.generate_tokens(io.StringIO(text).readline))
    block: list[str] = []
    last = -2
    for token in lines:
        if token.type != tokenize.COMMENT or token.string.startswith(("# type:", "# noqa", "#!")):
            continue
        comment = re.sub(r"^# ?", "", token.string)
        own_line = token.line.lstrip().startswith("#")
        if not (own_line and token.start[0] == last + 1):
            yield "\n".join(block)
            block = []
        block.append(comment)
        last = token.start[0] if own_line else -2
    yield "\n".join(block)
    yield from _docstrings(text)


def _docstrings(text: str) -> Iterator[str]:
    """Also the strings below constants and fields."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    value = statement.value.value
                    if isinstance(value, str):
                        yield _dedented(value)


def _dedented(docstring: str) -> str:
    first, *rest = docstring.splitlines() or [""]
    margin = min((len(line) - len(line.lstrip()) for line in rest if line.strip()), default=0)
    return "\n".join([first, *(line[margin:] for line in rest)])


def _of_lines(text: str, mark: str) -> Iterator[str]:
    block: list[str] = []
    for line in text.splitlines():
        own = re.match(rf"^\s*{mark}+ ?(.*)$", line)
        if own and not line.startswith("#!"):
            block.append(own[1])
            continue
        yield "\n".join(block)
        block = []
        if beside := re.search(rf"\S\s+{mark} (.*)$", line):
            yield beside[1]
    yield "\n".join(block)
