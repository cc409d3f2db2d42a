"""Describe the commands of `./run` for development, for help and completion. The script `run` carries them out."""

import click


def _command(name: str, help_text: str, *parameters: click.Parameter) -> click.Command:
    return click.Command(name, help=help_text, short_help=help_text.splitlines()[0], params=list(parameters))


def _arguments(name: str) -> click.Argument:
    return click.Argument([name], nargs=-1, type=click.Path())


COMMANDS = [
    _command(
        "test",
        """Run the tests; arguments go to pytest.

        Without arguments all tests run, three at a time. "-m scale" selects the tests with several machines and with
        failovers, "-m long" the tests that take minutes. "./run test -- --help" shows the options of pytest. Exits as
        pytest does: with 0 if all tests passed, with 1 if one failed.
        """,
        _arguments("pytest_arguments"),
    ),
    _command(
        "soak",
        """Check random reads and writes for consistency.

        Options, such as --minutes N and --seed S: docs/development.md, and after "./run test" this help. Exits with 1
        if a read was wrong.
        """,
        _arguments("options"),
    ),
    _command(
        "chaos",
        """Let one party misbehave after another, and judge what the others notice.

        Options, such as --minutes N, --seed S and --only NAME: docs/reliability.md, and after "./run test" this help.
        Exits with 1 if a read was wrong, an acknowledged write was lost, a fault was not named by status, or a limit
        was exceeded.
        """,
        _arguments("options"),
    ),
    _command(
        "bench",
        """Compare the speed with other designs.

        Options, such as --quick and --only ROW,...: docs/benchmarks.md, and after "./run test" this help.
        """,
        _arguments("options"),
    ),
    _command(
        "screenshots",
        """Take the pictures of the console in docs/screenshots/ again.

        VIEW is the beginning of a picture's name, such as users or live. Without it all pictures are taken.
        """,
        _arguments("view"),
    ),
    _command(
        "test-bare",
        "Test the start on a bare Debian 12 and 13, in containers.",
        click.Option(
            ["--all"],
            is_flag=True,
            help="Also test the service of systemd and docs/production.md on machines that boot; 15 minutes more.",
        ),
        _arguments("pytest_arguments"),
    ),
    _command(
        "test-docker",
        "Test Docker Compose, on a real Docker Engine.",
        click.Option(
            ["--swarm"],
            is_flag=True,
            help="Test Docker Swarm instead, for at most 10 minutes: two nodes, updates, lost nodes.",
        ),
        _arguments("pytest_arguments"),
    ),
    _command("check", "Run the linters, type checks and checks of Nginx's configuration."),
    _command(
        "lock", "Write requirements*.txt again, from pyproject.toml; arguments go to uv.", _arguments("uv_arguments")
    ),
    _command(
        "generate",
        """Write the generated files again.

        They are edge/conf/generated, in which the edge agrees with the app, and the second part of
        docs/command-line.md, which `./run --help` shows.
        """,
    ),
    _command(
        "packages",
        """Install Debian packages, and nothing else. Only root can.

        Without names it installs the packages that a stack needs. Debian does not start their servers.
        """,
        _arguments("names"),
    ),
]
