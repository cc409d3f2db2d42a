"""Run the commands for backups, in this process: a process for each would take most of the time of these tests."""

import json
import subprocess
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from testkit.stack import PERSONAL_SETTINGS, ROOT, Stack, clean_environment
from velikiy.cli import velikiy as commands


def velikiy(stack: Stack, *arguments: object, given: bytes = b"", code: int | None = 0, **environment: str) -> Result:
    settings: dict[str, str | None] = dict.fromkeys(PERSONAL_SETTINGS)
    settings |= {"SECRETS_DIR": str(stack.data / "secrets"), "PGREQUIREAUTH": "scram-sha-256", **environment}
    done = CliRunner().invoke(commands, list(map(str, arguments)), input=given, env=settings)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert code in (None, done.exit_code), done.stderr
    return done


def run_velikiy(stack: Stack, *arguments: object, given: bytes = b"") -> bytes:
    """Run the command as a person would type it. Return its stdout."""
    done = subprocess.run(
        [ROOT / "run", "velikiy", *map(str, arguments)],
        env=clean_environment(DATA=str(stack.data)),
        input=given,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def back_up(stack: Stack, file: Path, *options: object) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(velikiy(stack, "backup", file, "--json", *options).stdout)
    return made


def restore(stack: Stack, file: Path, *options: object) -> dict[str, Any]:
    restored: dict[str, Any] = json.loads(
        velikiy(stack, "restore", file, "--yes", "--no-save", "--json", *options).stdout
    )
    return restored


def refusal(stack: Stack, *arguments: object) -> str:
    """Return the sentence with which the command refuses, and changes nothing."""
    before = content(stack)
    message = velikiy(stack, *arguments, code=1).stderr
    assert content(stack) == before
    assert len(message.splitlines()) == 1, message
    return message


def content(stack: Stack) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row that a backup contains."""
    return {
        table: stack.sql(f"SELECT row_to_json(t)::text FROM {table} t ORDER BY 1")
        for table in ("users", "api_keys", "idempotency_keys", "imports", "row_history")
    }
