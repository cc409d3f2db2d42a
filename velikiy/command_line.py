"""Run commands as Unix users expect: messages of one line, exit codes, Ctrl-C, closed pipes, and no tracebacks.

`./run` and `velikiy` share this module. docs/command-line.md lists the exit codes.
"""

import contextlib
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

import click

USAGE, UNEXPECTED = 2, 70
"""Exit codes: a command line that makes no sense (click's own), and an error in the program (sysexits.h)."""


class CommandGroup(click.Group):
    """A group whose help shows the whole first sentence of each command. `sections` gives each command a heading."""

    def sections(self) -> dict[str, list[str]]:
        return {"Commands": self.list_commands(click.Context(self))}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, names in self.sections().items():
            shown = [self.commands[name] for name in names if not self.commands[name].hidden]
            with formatter.section(heading):
                formatter.write_dl(
                    [(command.name or "", command.get_short_help_str(LONG_SENTENCE)) for command in shown]
                )


LONG_SENTENCE = 200
"""Characters. The first sentence of a help text is shorter."""


def has_colours() -> bool:
    """Return whether stdout shows colours: a terminal does, unless its user has set NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module. Ctrl-C reaches it as soon as it can end without a traceback."""
    return ["env", "--block-signal=INT", sys.executable, "-P", "-m", module, *arguments]


def end_on_ctrl_c() -> None:
    """Let Ctrl-C end the process at once, without a traceback: while it still imports its modules. `./run` has blocked
    the signal until here. A signal that is ignored stays ignored: `&` in a script has switched it off."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def main(
    group: click.Group, program: str, name: str, arguments: Sequence[str], sentence: Callable[[Exception], str | None]
) -> int:
    """Run the command of the group that the arguments select, and return its exit code.

    Args:
        program: The words that started it, as they can be pasted.
        name: The beginning of each message.
        arguments: The arguments of the program.
        sentence: Returns the message about an error that its reader can repair, or None about other errors.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # the terminal may lack a letter
    try:
        status = _run(group, program, name, arguments, sentence)
        if sys.stdout:  # None if its descriptor is closed
            sys.stdout.flush()
    except BrokenPipeError:  # `./run logs | head` has seen enough
        return _pipe_is_closed()
    except OSError as error:
        click.echo(f"{name}: {sentence(error) or error}", err=True)
        _discard_output()
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def _run(
    group: click.Group, program: str, name: str, arguments: Sequence[str], sentence: Callable[[Exception], str | None]
) -> int:
    try:
        with group.make_context(program, list(arguments)) as context:
            group.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as interruption:
        if sys.stderr.isatty():
            click.echo(err=True)  # ends the line in which the terminal shows ^C
        return 128 + next((number for number in interruption.args if isinstance(number, int)), signal.SIGINT)
    except BrokenPipeError:
        raise
    except Exception as error:
        if text := sentence(error):
            click.echo(f"{name}: {text}", err=True)
            return 1
        kind = type(error).__name__
        click.echo(f"{name}: an unexpected error ({kind}). Please report it with {_saved_traceback()}", err=True)
        return UNEXPECTED
    return 0


def _saved_traceback() -> str:
    """Save the traceback of the present error, and return the path of its file; without a disk, the traceback."""
    text = traceback.format_exc()
    try:
        number, path = tempfile.mkstemp(prefix="velikiy-traceback-", suffix=".txt")
        with open(number, "w", errors="backslashreplace") as file:  # noqa: PTH123  # a descriptor
            file.write(f"{shlex.join(sys.argv)}\n{text}")
    except OSError:
        return f"this traceback:\n{text}"
    return path


def _pipe_is_closed() -> int:
    """Return the exit code of a program that SIGPIPE ends."""
    _discard_output()
    return 128 + signal.SIGPIPE


def _discard_output() -> None:
    """Discard what stdout still has to write. Python would report the failure once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            continue
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
