"""Run each block of docs/clients.md in order, and compare its output with the block below it."""

import contextlib
import io
import re
import subprocess
from collections.abc import Callable, Iterator

import pytest

from testkit.stack import ROOT, running

PAGE = (ROOT / "docs/clients.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)

RunBlock = Callable[[str, str], str]


@pytest.fixture(scope="module")
def run_block() -> Iterator[RunBlock]:
    """Run a block in a shell or in Python and return its output. Both keep the variables of earlier blocks."""
    with running() as stack, shell() as run_in_shell:
        variables: dict[str, object] = {}

        def run_block(language: str, block: str) -> str:
            block = block.replace("http://127.0.0.1", stack.edge)
            if language == "sh":
                return run_in_shell(block)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(block, variables)
            return output.getvalue()

        yield run_block


@contextlib.contextmanager
def shell() -> Iterator[Callable[[str], str]]:
    with subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as bash:
        assert bash.stdin
        assert bash.stdout

        def run_in_shell(block: str) -> str:
            assert bash.stdin
            bash.stdin.write(f"{block}\necho; echo end of the block\n")
            bash.stdin.flush()
            return "".join(iter(bash.stdout.readline, "end of the block\n"))  # type: ignore[union-attr]

        yield run_in_shell
        bash.stdin.close()


def test_each_block_of_the_client_guide_prints_the_output_below_it(run_block: RunBlock) -> None:
    assert len(BLOCKS) == PAGE.count("```sh\n") + PAGE.count("```python\n") > 8
    for language, block, expected in BLOCKS:
        output = run_block(language, block)
        pattern = re.escape(expected.strip()).replace(r"\.\.\.", ".*?")
        assert re.fullmatch(pattern, output.strip()), f"{block}\n{output}"
