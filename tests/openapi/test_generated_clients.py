"""Generators make complete clients of the document, without a warning, and the clients work.

The commands and the programs are those of docs/generated-clients.md. The generators are pinned in
tests/openapi/generators; they come from PyPI and npm.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from testkit.stack import ROOT, running
from velikiy.openapi.document import document
from velikiy.resources.base import registry

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not shutil.which("npm"), reason="there is no npm"),
]

GENERATORS = ROOT / "tests/openapi/generators"
PAGE = (ROOT / "docs/generated-clients.md").read_text()
BLOCKS = re.findall(r"```(sh|python|ts|text)\n(.*?)```", PAGE, re.DOTALL)

OPERATIONS = sorted(
    operation["operationId"] for methods in document(registry())["paths"].values() for operation in methods.values()
)

END_OF_BLOCK = "--- end of the block ---"

TYPESCRIPT = "--strict --target es2022 --module es2022 --moduleResolution bundler --lib es2022,dom,dom.iterable"


@dataclass
class Workshop:
    """A folder with the generators, and with the clients that the commands of the page make in it."""

    folder: Path
    edge: str

    def run(self, command: str) -> str:
        paths = [str(self.folder / "tools/bin"), str(self.folder / "node_modules/.bin"), os.environ["PATH"]]
        completed = subprocess.run(
            ["bash", "-e", "-c", command.replace("http://127.0.0.1", self.edge)],
            cwd=self.folder,
            env={**os.environ, "PATH": os.pathsep.join(paths), "NO_COLOR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        assert completed.returncode == 0, f"{command}\n{completed.stdout}"
        return completed.stdout

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text.replace("http://127.0.0.1", self.edge))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("clients")
    for name in ("package.json", "package-lock.json", "requirements.txt"):
        shutil.copy(GENERATORS / name, folder)
    with running("--apps", "1") as stack:
        workshop = Workshop(folder, stack.edge)
        workshop.run(f"{sys.executable} -m venv tools")
        workshop.run("python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt")
        workshop.run("npm ci --no-audit --no-fund --ignore-scripts")
        output = "".join(workshop.run(block) for block in commands())
        assert "warning" not in output.lower(), output
        yield workshop


def commands() -> list[str]:
    """Return the commands of the page, without the installation of the generators."""
    return [block for language, block in BLOCKS if language == "sh" and " install " not in block]


def programs(language: str) -> list[tuple[str, str]]:
    """Return the blocks of a program, each with its output."""
    return [(block, output) for (kind, block), (_, output) in pairwise(BLOCKS) if kind == language]


def check_outputs(language: str, output: str) -> None:
    expected = "".join(text + END_OF_BLOCK + "\n" for _, text in programs(language))
    assert re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*?"), output), output


def snake_case(name: str) -> str:
    return re.sub("([A-Z])", r"_\1", name).lower()


def test_versions_of_the_page_are_the_tested_versions() -> None:
    installs = [block for language, block in BLOCKS if language == "sh" and " install " in block]
    named = re.findall(r"([\w@/-]+?)(?:==|@)([\d.]+)", "".join(installs))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (GENERATORS / "requirements.in").read_text(), re.MULTILINE))
    pins |= json.loads((GENERATORS / "package.json").read_text())["devDependencies"]
    assert len(named) == 4
    assert named == [(name, pins[name]) for name, _ in named]


def test_client_for_python_has_each_operation_and_passes_mypy(workshop: Workshop) -> None:
    modules = {file.stem for file in (workshop.folder / "users_client/api").glob("*/*.py")} - {"__init__"}
    assert modules == {snake_case(name) for name in OPERATIONS}
    # The package's client.py is the same for every document, and mypy has complaints about it.
    workshop.run("mypy --strict --follow-imports silent users_client/api users_client/models")


def test_programs_for_python_print_the_documented_output(workshop: Workshop) -> None:
    program = "".join(f"{block}\nprint({END_OF_BLOCK!r})\n" for block, _ in programs("python"))
    workshop.write("program.py", program)
    check_outputs("python", workshop.run("python program.py"))


def test_client_for_typescript_has_each_operation_and_its_program_prints_the_documented_output(
    workshop: Workshop,
) -> None:
    [interface] = re.findall(
        r"^export interface operations \{$(.*?)^\}$",
        (workshop.folder / "users.ts").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert sorted(re.findall(r"^    (\w+): \{$", interface, re.MULTILINE)) == OPERATIONS
    [(block, _)] = programs("ts")
    workshop.write("program.ts", f"{block}\nconsole.log({json.dumps(END_OF_BLOCK)});\n")
    workshop.run(f"tsc {TYPESCRIPT} --outDir built program.ts && mv built/program.js program.mjs")
    check_outputs("ts", workshop.run("node program.mjs"))


def test_other_generators_and_a_linter_do_not_complain(workshop: Workshop) -> None:
    workshop.run("openapi-ts --input openapi.json --output hey --silent")
    exported = (workshop.folder / "hey/sdk.gen.ts").read_text()
    assert sorted(re.findall(r"^export const (\w+) = ", exported, re.MULTILINE)) == OPERATIONS
    workshop.run(f"tsc {TYPESCRIPT} --noEmit hey/index.ts")
    models = "--input-file-type openapi --output-model-type pydantic_v2.BaseModel --formatters builtin"
    assert workshop.run(f"datamodel-codegen --input openapi.json {models} --output models.py") == ""
    workshop.run("python -m py_compile models.py")
    complaints = json.loads(workshop.run("redocly lint openapi.json --format json 2> redocly.log"))["totals"]
    assert (complaints["errors"], complaints["warnings"]) == (0, 0)
