"""Complete command lines in bash, from the parsers of the commands themselves."""

import shlex
from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem, ShellComplete

SCRIPT = """\
# Completion for ./run in bash, written by `./run completion bash`.
_velikiy_run() {
    local line IFS=$'\\n'
    COMPREPLY=()
    # Other projects have a program of this name, too. Theirs completes files.
    if [[ $(readlink -f -- "${1/#\\~/$HOME}" 2> /dev/null) != %(program)s ]]; then
        compopt -o default
        return
    fi
    for line in $(%(program)s complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2> /dev/null); do
        case $line in
            dir,*) compopt -o dirnames ;;
            file,*) compopt -o default ;;
            plain,*) COMPREPLY+=("${line#plain,}") ;;
        esac
    done
}
complete -F _velikiy_run run
"""
"""`complete` finds the function by the last part of the path: ./run, ../run and /srv/velikiy/run."""


def script(program: str) -> str:
    """Return the completion script of the program at this path."""
    return SCRIPT % {"program": shlex.quote(program)}


def completions(group: click.Group, words: list[str]) -> Iterator[str]:
    """Return what may follow, for the script: lines of a type and a value.

    Args:
        words: The words of the command line as bash splits them, at = too. The last one is incomplete.
    """
    *before, incomplete = map(_unquoted, _joined(words)) if words else [""]
    if incomplete.startswith("--") and "=" in incomplete:
        option, _, incomplete = incomplete.partition("=")
        before.append(option)
    for item in complete(group, before, incomplete):
        yield f"{item.type},{item.value}"


def _joined(words: list[str]) -> list[str]:
    """Join an option, = and a value again."""
    joined: list[str] = []
    for number, word in enumerate(words):
        if joined and "=" in (word, words[number - 1]):
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def complete(group: click.Group, arguments: list[str], incomplete: str) -> list[CompletionItem]:
    return ShellComplete(group, {}, "", "").get_completions(arguments, incomplete)


def _unquoted(word: str) -> str:
    """Return the word without its quotes. The quotes of an incomplete word may be open."""
    for attempt in (word, word + "'", word + '"'):
        try:
            return "".join(shlex.split(attempt))
        except ValueError:
            continue
    return word
