"""The documents are true: their commands agree, and the files that they name exist."""

import re
import subprocess
from pathlib import Path

import pytest

from testkit.stack import ROOT
from tests.docs import sources
from velikiy.stack.commands import run

DOCUMENTS = [
    name
    for name in (
        *("README.md", "README.ru.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
        *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md")),
    )
    if (ROOT / name).exists()
]


def blocks(document: str, *languages: str) -> list[str]:
    text = (ROOT / document).read_text()
    return [code for language, code in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL) if language in languages]


def commands(document: str) -> list[str]:
    """Return the lines of shell blocks, and the lines that are typed in console blocks."""
    shell = [line for code in blocks(document, "sh") for line in code.splitlines()]
    typed = [line for code in blocks(document, "console") for line in code.splitlines() if line.startswith("$ ")]
    return shell + typed


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_fence_of_a_block_stands_alone_in_its_line(document: str) -> None:
    """Wrapping a block as if it were a paragraph moves its fence to the end of a line, and the rest becomes a block."""
    text = (ROOT / document).read_text()
    fences = re.findall(r"^ *```(\w*)$", text, re.MULTILINE)
    assert text.count("```") == len(fences)
    assert not any(fences[1::2])


def test_every_event_of_the_services_is_explained() -> None:
    rooms = ("coherence", "console", "http", "keys", "postgres", "relay", "resources", "server")
    code = "".join(file.read_text() for room in rooms for file in (ROOT / "velikiy" / room).rglob("*.py"))
    events = set(re.findall(r'\blog\.(?:debug|info|warning|error|critical|exception)\(\s*"([\w.]+)"', code))
    assert "redis.unavailable" in events
    explained = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/logs.md").read_text(), re.MULTILINE))
    assert events <= explained, events - explained


def test_both_readmes_have_the_same_commands() -> None:
    assert commands("README.md") == commands("README.ru.md")
    assert len(commands("README.md")) > 10


def test_both_readmes_have_the_same_inline_code() -> None:
    english, russian = (re.findall(r"`[^`\n]+`", (ROOT / name).read_text()) for name in ("README.md", "README.ru.md"))
    assert set(english) == set(russian)


def test_the_first_two_blocks_are_the_two_commands_and_can_be_pasted() -> None:
    assert blocks("README.md", "sh")[:2] == ["./run up --detach\n", "docker compose up --build\n"]


def test_every_command_of_run_in_the_readme_is_one_that_it_knows() -> None:
    used = {word for line in commands("README.md") for word in re.findall(r"\./run ([a-z-]+)", line)}
    assert used <= {*run.commands, "help"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_and_function_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#:]+)", text):
        assert ((ROOT / document).parent / target).exists(), target
    for file, name in re.findall(r"`([\w./-]+\.(?:py|lua|conf|sh|sql)|run|edge/start):(\w+)`", text):
        assert (ROOT / file).exists(), file
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{file} has no {name}"


@pytest.mark.parametrize("file", sources.files())
def test_every_file_and_symbol_that_a_comment_names_exists(file: str) -> None:
    """A reference is a path with a folder: `edge/lua/redis.lua`, also with a symbol: `edge/lua/redis.lua:read`."""
    text = sources.comments(file)
    for target, name in re.findall(r"(?<![\w/.:-])((?:[\w.-]+/)+[\w.-]+\.(?:py|lua|conf|sh|sql|md))(?::(\w+))?", text):
        assert (ROOT / target).exists(), target
        if name:
            assert re.search(rf"\b{name}\b", (ROOT / target).read_text()), f"{target} has no {name}"


def test_every_race_names_a_test_file_that_exists() -> None:
    rows = re.findall(r"^\|(.*)\|$", (ROOT / "docs/races.md").read_text(), re.MULTILINE)
    races = [row.split(" | ") for row in rows if not re.match(r" interleaving |-", row)]
    assert races
    for race in races:
        assert len(race) == 3, race
        files = re.findall(r"`(tests/[\w./-]+)`", race[2])
        assert files, f"no test file: {race[0].strip()}"
        for file in files:
            assert (ROOT / file).is_file(), file


def test_no_address_of_a_registry_and_no_path_of_a_machine_is_in_the_repository() -> None:
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    registries = "|".join(("py" + "pi.org", "python" + "hosted", "npm" + "js", "deb" + ".debian.org"))
    for name in listed:
        file = Path(ROOT / name)
        text = file.read_text(errors="replace") if file.is_file() else ""
        assert not re.search(rf"({registries})|/ro" + r"ot/\.|/wo" + "rk/", text), name
