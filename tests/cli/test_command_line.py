"""The command line, as Unix users expect it: help, exit codes, pipes, Ctrl-C, `.env`, completion, and no tracebacks."""

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from testkit.machine import root_only
from testkit.stack import ROOT, Stack, clean_environment, folder, run
from velikiy import cli, command_line
from velikiy.cli.errors import command_of_run
from velikiy.findings import Finding
from velikiy.settings import BadSetting, ServiceSettings, load, read_env_file
from velikiy.stack import Refusal, commands, completion, manual
from velikiy.stack.commands.folder import place_data
from velikiy.stack.plan import Plan

HELP = "--help"


def shell(script: str, *, stack: Stack, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of bash, in which $run starts `./run` and $data is the folder of the stack."""
    known = {"run": str(ROOT / "run"), "data": str(stack.data)}
    return subprocess.run(
        ["bash", "-c", script],
        env=clean_environment(**known, **environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def words_of_all_commands() -> list[str]:
    return re.findall(r"^### \./run ?(.*)$", manual.DOCUMENT.read_text(), re.MULTILINE)


class TestHelp:
    def test_the_reference_agrees_with_the_parsers(self) -> None:
        _, _, generated = manual.DOCUMENT.read_text().partition(manual.BEGIN)
        assert generated.strip() == manual.reference().strip(), "run ./run generate and commit the result"

    def test_no_line_of_the_reference_has_more_than_80_columns(self) -> None:
        assert [line for line in manual.reference().splitlines() if len(line) > 80] == []

    def test_every_command_that_the_script_carries_out_has_help(self) -> None:
        labels = re.findall(r"^    ([a-z -]+(?: \| [a-z -]+)*)\)", (ROOT / "run").read_text(), re.MULTILINE)
        carried_out = {name.strip() for label in labels for name in label.split("|")} & {
            "test",
            "soak",
            "lock",
            "check",
        }
        assert carried_out <= set(commands.run.commands)

    def test_help_needs_no_python(self) -> None:
        """A new machine has none. With this PYTHONHOME no Python starts."""
        for words in ("", "up", "velikiy users import", "test"):
            completed = run(*words.split(), HELP, PYTHONHOME="/none")
            assert (completed.returncode, completed.stderr) == (0, "")
            assert completed.stdout.startswith(f"Usage: ./run {words}".rstrip())

    @pytest.mark.parametrize(
        "arguments", ["-h", "help up", "up -h", "velikiy --data x users -h", "psql -h", "redis --help"]
    )
    def test_every_form_of_help_prints_the_page_of_the_command(self, arguments: str) -> None:
        completed = run(*arguments.split())
        assert completed.returncode == 0
        assert completed.stdout.startswith("Usage: ./run ")

    def test_no_option_of_velikiy_is_called_data(self) -> None:
        """`./run` takes that one away."""

        def options(command: click.Command) -> Iterator[str]:
            for parameter in command.params:
                yield from parameter.opts
            if isinstance(command, click.Group):
                for sub in command.commands.values():
                    yield from options(sub)

        assert "--data" not in options(cli.velikiy)


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("rolback", "Did you mean 'rollback'?"),
            ("up --prot 1", "Did you mean '--port'?"),
            ("up --port many", "--port"),
            ("up --port 99999", "1<=x<=65535"),
            ("status --data", "requires an argument"),
            ("status --data=", "the folder has no name"),
        ],
    )
    def test_wrong_command_line_exits_with_2_and_names_the_mistake(
        self, capsys: pytest.CaptureFixture[str], arguments: str, message: str
    ) -> None:
        placed = place_data(arguments.split())
        assert command_line.main(commands.run, "./run", "./run", placed, lambda error: None) == command_line.USAGE
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [("user", "Did you mean 'users'?"), ("users export --fromat csv", "Did you mean '--format'?")],
    )
    def test_mistakes_in_commands_of_velikiy_get_a_suggestion(
        self, capsys: pytest.CaptureFixture[str], arguments: str, message: str
    ) -> None:
        main = command_line.main(cli.velikiy, "velikiy", "velikiy", arguments.split(), lambda error: None)
        assert main == command_line.USAGE
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("fly --help", "No such command 'fly'"),
            ("help fly", "there is no command 'fly'"),
            ("--data x", "a command after it"),
            ("check everything", "takes no arguments"),
            ("--data x test", "takes no --data"),
        ],
    )
    def test_mistakes_that_the_script_notices_exit_with_2(self, arguments: str, message: str) -> None:
        completed = run(*arguments.split())
        assert (completed.returncode, completed.stdout) == (command_line.USAGE, "")
        assert message in completed.stderr

    def test_unforeseen_error_exits_with_70_and_saves_its_traceback_for_its_user_only(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        @click.group()
        def group() -> None:
            raise ZeroDivisionError("personal data")

        group.command("fail")(lambda: None)
        assert command_line.main(group, "x", "x", ["fail"], lambda error: None) == command_line.UNEXPECTED
        message = capsys.readouterr().err
        [file] = map(Path, re.findall(r"/\S+\.txt", message))
        assert "personal data" not in message
        assert "Traceback" not in message
        assert "ZeroDivisionError" in file.read_text()
        assert file.stat().st_mode & 0o077 == 0
        file.unlink()

    @pytest.mark.parametrize("content", ["", "[]", "null", '{"port": 1}', "[" * 50_000, "\x00", '{"edges": null}'])
    def test_damaged_stack_json_is_refused_with_a_command_that_repairs_it(self, content: str) -> None:
        with folder() as temporary:
            data = temporary / "my data"
            data.mkdir()
            (data / "stack.json").write_text(content)
            with pytest.raises(Refusal) as refused:
                Plan.load(data)
            repair = re.findall(r"; the data stays: (.*)$", str(refused.value))
            assert repair == [f"./run down --data '{data}' && rm -r '{data}/stack.json'"]

    @root_only
    def test_folder_of_another_user_is_refused_with_the_command_of_its_owner(self, stack: Stack) -> None:
        stranger = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        with folder() as home:
            (home / "cache").symlink_to("/var/cache")
            environment = clean_environment(HOME=str(home), XDG_CACHE_HOME="/var/cache")
            completed = subprocess.run(
                [*stranger, ROOT / "run", "status", "--data", stack.data],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
        assert completed.returncode == 1
        assert f"Run it as its owner: sudo {ROOT}/run status --data {stack.data}, or choose" in completed.stderr


class TestData:
    @pytest.mark.parametrize(
        ("typed", "placed"),
        [
            ("status --json --data x", "status --data x --json"),
            ("--data=x status --json", "status --data=x --json"),
            ("velikiy users export - --data x", "velikiy --data x users export -"),
            ("psql --data a -c --data b", "psql --data b -c"),
            ("redis -- SET k --data", "redis -- SET k --data"),
            ("status --data", "status --data"),
            ("status", "status"),
        ],
    )
    def test_data_is_placed_behind_the_command(self, typed: str, placed: str) -> None:
        assert place_data(typed.split()) == placed.split()

    @pytest.mark.parametrize("arguments", ["--data $name status", "status --data=../${PWD##*/}/$name"])
    def test_data_stands_anywhere_and_may_be_relative(self, stack: Stack, arguments: str) -> None:
        completed = shell(f'cd "${{data%/*}}"; name=${{data##*/}}; "$run" {arguments} | head -n 1', stack=stack)
        assert completed.stdout == "ready\n", completed.stderr

    def test_data_in_the_home_folder_is_found_and_its_command_can_be_pasted(self) -> None:
        with folder() as home:
            (home / "a b").mkdir()
            completed = run("status", "--data=~/a b", HOME=str(home))
            assert completed.stdout == (
                f"not running (data: {home}/a b); start it with {ROOT}/run up --data '{home}/a b'\n"
            )
        assert "is not the path of a folder" in run("status", "--data=~nobody.at.all/x").stderr


class TestPipes:
    def test_console_of_postgresql_reads_stdin_and_passes_its_exit_code_on(self, stack: Stack) -> None:
        script = 'echo "SELECT 40 + 2" | "$run" psql -At --data "$data"; echo "SELEC" | "$run" psql --data "$data" -v ON_ERROR_STOP=1; echo $?'
        assert shell(script, stack=stack).stdout.split() == ["42", "3"]

    def test_console_of_redis_reads_stdin_and_passes_arguments_on(self, stack: Stack) -> None:
        script = 'echo PING | "$run" redis --data "$data"; "$run" --data "$data" redis -- ECHO --data'
        assert shell(script, stack=stack).stdout.split() == ["PONG", "--data"]

    @pytest.mark.parametrize(
        ("script", "code"),
        [
            ('"$run" status --data "$data" | head -n 0; exit ${PIPESTATUS[0]}', 141),
            ('"$run" velikiy cache show /users --data "$data" | head -n 0; exit ${PIPESTATUS[0]}', 141),
            ('"$run" status --data "$data" > /dev/full', 1),
            ('"$run" status --data "$data" >&- <&-', 1),
            ('"$run" status --data "$data" <&- 2>&-', 0),
        ],
    )
    def test_closed_or_full_stream_ends_a_command_without_a_traceback(
        self, stack: Stack, script: str, code: int
    ) -> None:
        completed = shell(script, stack=stack)
        assert completed.returncode == code, completed.stderr
        assert "Traceback" not in completed.stderr
        assert completed.stderr.count("\n") <= 1

    def test_ctrl_c_at_any_moment_ends_a_command_silently(self, stack: Stack) -> None:
        moments = random.Random(20)
        for arguments in (["status"], ["velikiy", "cache", "show", "/users"], ["velikiy", "users", "export"]):
            process = subprocess.Popen(
                [ROOT / "run", *arguments, "--data", stack.data],
                env=clean_environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            time.sleep(moments.uniform(0, 0.6))
            os.killpg(process.pid, signal.SIGINT)
            _, messages = process.communicate(timeout=30)
            assert process.returncode in (0, 130, -signal.SIGINT)
            assert "Traceback" not in messages
            assert "Exception" not in messages

    @pytest.mark.parametrize(
        ("environment", "has_colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
    )
    def test_logs_are_coloured_on_a_terminal_unless_its_user_objects(
        self, stack: Stack, environment: dict[str, str], has_colour: bool
    ) -> None:
        ours, theirs = pty.openpty()
        subprocess.run(
            [ROOT / "run", "logs", "redis", "-n", "1", "--data", stack.data],
            env=clean_environment(**{"TERM": "xterm", "NO_COLOR": "", **environment}),
            stdout=theirs,
            check=True,
        )
        os.close(theirs)
        text = os.read(ours, 10_000)
        os.close(ours)
        assert b"redis" in text
        assert (b"\033[" in text) is has_colour


class TestEnvFile:
    @pytest.mark.parametrize(
        ("content", "value"),
        [
            (b"\xef\xbb\xbfEDGE_TTL=7\n", "7"),
            (b"# x\r\nEDGE_TTL=7\r\n", "7"),
            (b"export EDGE_TTL='7'\n", "7"),
            (b'EDGE_TTL = "7"  # seconds\n', "7"),
            (b"EDGE_TTL=\n", ""),
            ("# по-русски\nEDGE_TTL=7".encode(), "7"),
        ],
    )
    def test_env_file_may_be_written_in_every_common_way(self, tmp_path: Path, content: bytes, value: str) -> None:
        (tmp_path / ".env").write_bytes(content)
        assert read_env_file(tmp_path / ".env") == {"EDGE_TTL": value}
        assert load(ServiceSettings, tmp_path / ".env").edge_ttl == int(value or 5)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"A=1\n# \xef\xf0\xe8\n", "is not UTF-8, in line 2"),
            (b"\xff\xfeA\x00=\x001\x00", "is not UTF-8, in line 1"),
            (b"A=1\nPORT 8080\n", "has a line that is no setting: line 2"),
            (b"A=1\x00\n", "NUL"),
        ],
    )
    def test_env_file_that_is_damaged_is_refused_with_its_line(
        self, tmp_path: Path, content: bytes, message: str
    ) -> None:
        (tmp_path / ".env").write_bytes(content)
        with pytest.raises(BadSetting, match=message):
            read_env_file(tmp_path / ".env")

    def test_env_file_that_is_no_file_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to(tmp_path / "nothing")
        for path, message in (
            ("", "is a folder"),
            ("pipe", "is a pipe"),
            ("link", "is a link to a file that does not"),
        ):
            with pytest.raises(BadSetting, match=message):
                read_env_file(tmp_path / path)

    def test_command_reads_no_env_file_of_another_project(self, stack: Stack, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text("DATABASE_URL=postgresql://nowhere:1/x\n")
        script = f'cd {tmp_path}; "$run" velikiy cache show /users --data "$data"'
        assert shell(script, stack=stack).returncode == 0

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("LOG_LEVEL", " Debug ", "debug"),
            ("AUTH", "Writes", "writes"),
            ("METRICS", "OFF", "off"),
            ("REDIS_DIRECT", "Yes", True),
        ],
    )
    def test_words_are_read_in_any_case(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: object
    ) -> None:
        monkeypatch.setenv(name, value)
        assert getattr(load(ServiceSettings, None), name.lower()) == expected

    def test_bad_boolean_is_refused_with_the_allowed_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REDIS_DIRECT", "maybe")
        with pytest.raises(BadSetting, match=r"REDIS_DIRECT='maybe' is not allowed: it must be true or false"):
            load(ServiceSettings, None)

    def test_bad_setting_does_not_keep_a_stack_from_being_seen_and_stopped(self, stack: Stack) -> None:
        with folder() as temporary:
            completed = run("status", DATA=str(temporary), EDGES="99", LOG_LEVEL="loud")
            assert (completed.returncode, completed.stderr) == (3, "")
        # A running stack goes on with its settings, and status says that the next start will be refused.
        settings = {"EDGES": "99", "LOG_LEVEL": "loud"}
        shown = run("status", "--data", str(stack.data), "--json", **settings)
        assert shown.returncode == 0, shown.stdout
        found = [it["what"] for it in json.loads(shown.stdout)["findings"] if it["name"] == "settings.refused"]
        assert [sentence.split(" is not")[0] for sentence in found] == ["LOG_LEVEL='loud'", "EDGES='99'"]
        examined = run("velikiy", "doctor", "--data", str(stack.data), **settings)
        assert examined.returncode == 1
        assert "LOG_LEVEL='loud' is not allowed" in examined.stdout
        assert "EDGES='99' is not allowed: it must be a whole number from 1 to 16." in examined.stdout

    def test_commands_in_advice_can_be_pasted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        advice = Finding("x", "X.", "Run ./run psql -c 'SELECT 1' (or ./run up --detach).").with_commands
        assert "./run psql --data /x -c" in advice(lambda word: f"./run {word} --data /x").advice
        monkeypatch.setenv("VELIKIY_RUN", "/srv/a/run")
        monkeypatch.setenv("VELIKIY_COMMAND", "/srv/a/run velikiy --data '/srv/my data'")
        assert advice(command_of_run).advice == (
            "Run /srv/a/run psql --data '/srv/my data' -c 'SELECT 1' (or /srv/a/run up --data '/srv/my data' --detach)."
        )

    def test_setting_of_the_stack_that_up_has_not_applied_is_named(self, stack: Stack) -> None:
        shown = run("status", "--data", str(stack.data), APPS="5", REDIS_MEMORY="300", EDGES=str(len(stack.edges)))
        assert "APPS=5 is set, but the stack runs with APPS=2. Run" in shown.stdout
        assert "REDIS_MEMORY=300 is set, but the stack runs with REDIS_MEMORY=256. Run" in shown.stdout
        assert "EDGES=2 is set" not in shown.stdout


class TestCompletion:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["sta"], {"plain,status"}),
            (["--data", "x", "dow"], {"plain,down"}),
            (["up", "--mon"], {"plain,--monitoring"}),
            (["status", "--data", "/t"], {"dir,/t"}),
            (["velikiy", "users", "im"], {"plain,import"}),
            (["velikiy", "users", "import", "--on"], {"plain,--on-conflict"}),
            (["velikiy", "users", "import", "--on-conflict", "=", "re"], {"plain,reject"}),
            (["velikiy", "keys", "create", "x", "--scope", "w"], {"plain,write"}),
            (["velikiy", "users", "import", "peo"], {"file,peo"}),
            (["test-docker", "--s"], {"plain,--swarm"}),
        ],
    )
    def test_words_are_completed_from_the_parsers(self, words: list[str], expected: set[str]) -> None:
        assert set(completion.completions(commands.run, words)) == expected

    def test_names_of_processes_are_completed(self, stack: Stack) -> None:
        completed = run("complete", "--", "logs", "--data", str(stack.data), "ed")
        assert completed.stdout.split() == ["plain,edge1", "plain,edge2"]

    def test_script_completes_in_bash_and_leaves_programs_of_other_projects_alone(self, tmp_path: Path) -> None:
        assert shutil.which("bash")
        (tmp_path / "run").write_text("#!/bin/sh\ntouch touched\n")
        (tmp_path / "run").chmod(0o755)
        script = (
            f'source <("{ROOT}/run" completion bash); compopt() {{ :; }}; '
            f'for program in "{ROOT}/run" "{tmp_path}/run"; do '
            'COMP_WORDS=("$program" stat) COMP_CWORD=1; _velikiy_run "$program"; echo "[${COMPREPLY[*]}]"; done; complete -p run'
        )
        completed = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=True
        )
        assert completed.stdout.splitlines() == ["[status]", "[]", "complete -F _velikiy_run run"]
        assert not (tmp_path / "touched").exists()


def test_json_of_status_is_the_same_after_a_relative_path(stack: Stack) -> None:
    completed = shell('cd "${data%/*}"; "$run" status --json --data "${data##*/}"', stack=stack)
    assert json.loads(completed.stdout)["data"] == str(stack.data)
