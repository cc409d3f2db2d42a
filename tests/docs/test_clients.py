"""docs/clients.md is true: each of its blocks is run, in order, and says what stands below it."""

import contextlib
import io
import re
import subprocess
from collections.abc import Callable, Iterator

import pytest

from testkit.stack import ROOT, running

PAGE = (ROOT / "docs/clients.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)

Run = Callable[[str, str], str]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """What a block prints, in a shell or in Python; each remembers what it was told before."""
    with running() as stack, shell() as tell:
        names: dict[str, object] = {}

        def run(language: str, block: str) -> str:
            block = block.replace("http://127.0.0.1", stack.edge)
            if language == "sh":
                return tell(block)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(block, names)
            return said.getvalue()

        yield run


@contextlib.contextmanager
def shell() -> Iterator[Callable[[str], str]]:
    with subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as bash:
        assert bash.stdin
        assert bash.stdout

        def tell(block: str) -> str:
            assert bash.stdin
            bash.stdin.write(f"{block}\necho; echo end of the block\n")
            bash.stdin.flush()
            return "".join(iter(bash.stdout.readline, "end of the block\n"))  # type: ignore[union-attr]

        yield tell
        bash.stdin.close()


def test_each_block_prints_what_stands_below_it(run: Run) -> None:
    assert len(BLOCKS) == PAGE.count("```sh\n") + PAGE.count("```python\n") > 8
    for language, block, expected in BLOCKS:
        said = run(language, block)
        pattern = re.escape(expected.strip()).replace(r"\.\.\.", ".*?")
        assert re.fullmatch(pattern, said.strip()), f"{block}\n{said}"
