"""Run the bulk commands, and make and inspect their files."""

import json
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

from testkit.stack import ROOT, Stack, clean_environment, wait_until

CSV_WITH_A_REJECTED_LINE = b"name,email\nAlice,alice@example.com\n,none\n"
"""The third line is rejected."""

REJECTED_LINE = b'{"line":9,"errors":[{"field":"name","detail":"is of an earlier import"}],"row":{}}\n'
"""A rejected row of an earlier import."""

LONG_NAME = "A person with quite a long name so that it takes a mebibyte"
"""Long enough that 20,000 lines exceed the first megabyte: an import reads so much before its first chunk."""

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
"""The exit code of a command that this signal has interrupted."""

Completed = subprocess.CompletedProcess[bytes]


def run_users(stack: Stack, *arguments: object, given: bytes = b"", cwd: Path | None = None) -> Completed:
    return subprocess.run(
        [ROOT / "run", "velikiy", "users", *map(str, arguments)],
        env=clean_environment(DATA=str(stack.data)),
        cwd=cwd,
        input=given,
        capture_output=True,
        timeout=120,
        check=False,
    )


def run_in_shell(stack: Stack, command: str, **variables: object) -> Completed:
    """Run a command of bash in which `$users` stands for the command, and `$name` for the value of `name`."""
    return subprocess.run(
        ["bash", "-c", command.replace("$users", f"{ROOT}/run velikiy users")],
        env=clean_environment(DATA=str(stack.data), **{name: str(value) for name, value in variables.items()}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )


def start_users(stack: Stack, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [ROOT / "run", "velikiy", "users", *map(str, arguments)],
        env=clean_environment(DATA=str(stack.data)),
        cwd=stack.data.parent,  # the default folder of rows that were rejected from stdin
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def stderr_of(completed: Completed) -> str:
    return completed.stderr.decode()


def run_import(stack: Stack, *arguments: object, given: bytes = b"", code: int = 0) -> Completed:
    completed = run_users(stack, "import", *arguments, given=given)
    assert completed.returncode == code, stderr_of(completed)
    return completed


def start_import_and_await_progress(stack: Stack, content: bytes, *options: object) -> subprocess.Popen[bytes]:
    """Start an import from stdin, and wait until it has committed each complete chunk of the content.

    The import waits for more input afterwards.
    """
    process = start_users(stack, "import", "-", *options)
    assert process.stdin is not None
    process.stdin.write(content)
    process.stdin.flush()
    wait_until(lambda: stack.sql("SELECT lines FROM imports WHERE lines > 20000"))
    return process


def csv_of_people(count: int, name: str = "Person") -> bytes:
    """Return CSV with this many people, each with another number."""
    return b"name,email\n" + b"".join(b"%s %d,person%d@example.com\n" % (name.encode(), n, n) for n in range(count))


def with_invalid_lines(content: bytes, *lines: int) -> bytes:
    parts = content.splitlines(keepends=True)
    for line in lines:
        parts[line - 1] = b"bad,row\n"
    return b"".join(parts)


def read_rejects(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fingerprint(path: Path) -> tuple[object, ...]:
    """Return everything that would differ if the file had been touched."""
    status = path.stat()
    return path.read_bytes(), status.st_mode, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in_order(stack: Stack) -> list[str]:
    return [name for (name,) in stack.sql("SELECT name FROM users ORDER BY id")]


def count_users(stack: Stack) -> int:
    return int(stack.sql("SELECT count(*) FROM users")[0][0])
