"""Write the reference of all commands in docs/command-line.md, which `./run --help` shows without Python.

`./run generate` runs this module, and a test compares the document with the parsers.
"""

from collections.abc import Iterator

import click

from velikiy import cli
from velikiy.stack import commands
from velikiy.stack.code_copy import CHECKOUT
from velikiy.stack.commands import clients

DOCUMENT = CHECKOUT / "docs" / "command-line.md"

BEGIN = "<!-- ./run generate writes the rest of this page from the parsers of the commands. -->\n"

WIDTH = {"terminal_width": 80, "max_content_width": 80}


def reference() -> str:
    """Return the help of each command, below a heading with its words."""
    pages = [*_pages(commands.run, "./run", None), *_pages(cli.velikiy, "./run velikiy", None)]
    return "\n".join(f"### {words}\n\n```text\n{text}\n```\n" for words, text in pages)


def _pages(command: click.Command, words: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    name = words.rpartition(" ")[2] if parent else words
    context = click.Context(command, parent, info_name=name, **{**command.context_settings, **WIDTH})
    if command is not clients.velikiy:  # its page is that of the program that it runs
        yield words, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            sub = command.commands[name]
            if not sub.hidden:
                yield from _pages(sub, f"{words} {name}", context)


def write() -> None:
    text = DOCUMENT.read_text()
    head, found, _ = text.partition(BEGIN)
    if not found:
        raise ValueError(f"{DOCUMENT} does not contain the line that begins its generated part")
    DOCUMENT.write_text(f"{head}{BEGIN}\n{reference()}")
    print(f"docs/{DOCUMENT.name}")


if __name__ == "__main__":
    write()
