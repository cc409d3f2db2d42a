"""Other users of the machine: they read no secret of a stack, and a stack takes nothing from their folders."""

import os
import socket
import socketserver
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from redis.exceptions import NoPermissionError

from testkit.machine import root_only
from testkit.outages import refusing
from testkit.stack import Stack, folder, refused, run, running, wait_until
from velikiy.stack.consoles import masked

NOBODY = 65534


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    ids = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return subprocess.run(["setpriv", *ids, *command], capture_output=True, text=True, cwd="/", check=False)


@contextmanager
def recorded(path: Path, reply: bytes) -> Iterator[list[bytes]]:
    """Listen at the path of a Unix socket, send the reply to each client, and record what the clients send."""
    sent: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(2)
            sent.append(connection.recv(4096))
            connection.sendall(reply)
            sent.append(connection.recv(4096))

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()
        thread = threading.Thread(target=accept, args=(listener,), daemon=True)
        thread.start()
        try:
            yield sent
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


class TestFolders:
    @root_only
    def test_folder_of_another_user_is_refused_by_name(self) -> None:
        with folder() as temporary:
            data = temporary / "data"
            data.mkdir()
            os.chown(data, NOBODY, NOBODY)
            for command in (["up", "--detach"], ["status"], ["down"], ["velikiy", "cache", "show", "/users"], ["psql"]):
                message = refused(command[0], "--data", str(data), *command[1:])
                assert f"{data} belongs to another user (nobody)" in message
            assert [*data.iterdir()] == []
            assert data.stat().st_uid == NOBODY

    @root_only
    def test_folder_below_the_folder_of_another_user_is_refused_by_name(self) -> None:
        with folder() as temporary:
            (temporary / "theirs").mkdir()
            os.chown(temporary / "theirs", NOBODY, NOBODY)
            assert f"{temporary}/theirs belongs" in refused("up", "--detach", "--data", str(temporary / "theirs/data"))

    @root_only
    def test_secrets_of_another_user_are_refused_by_name(self) -> None:
        with folder() as temporary:
            secrets = temporary / "data" / "secrets"
            secrets.mkdir(parents=True)
            os.chown(secrets, NOBODY, NOBODY)
            assert f"{secrets} belongs to another user" in refused("up", "--detach", "--data", str(temporary / "data"))

    @pytest.mark.parametrize("name", [".", "secrets"])
    def test_folder_that_others_can_write_is_refused_by_name(self, name: str) -> None:
        with folder() as temporary:
            (temporary / "data" / "secrets").mkdir(parents=True)
            (temporary / "data" / name).chmod(0o777)
            message = refused("up", "--detach", "--data", str(temporary / "data"))
            assert f"chmod go-w {(temporary / 'data' / name).resolve()}" in message

    @root_only
    def test_another_user_enters_no_folder_of_a_stack_and_holds_no_lock(self, stack: Stack) -> None:
        assert stat.S_IMODE(stack.data.stat().st_mode) == 0o700
        for name in ("secrets/redis_password", "secrets/edge_secret", "stack.json", "logs/app1.log"):
            assert "Permission denied" in as_nobody("cat", str(stack.data / name)).stderr
        assert as_nobody("flock", "--nonblock", str(stack.data / "lock"), "true").returncode != 0

    def test_stack_json_and_status_contain_no_secret_and_nothing_made_from_one(self, stack: Stack) -> None:
        secrets = [
            stack.secret(name) for name in ("app_password", "redis_password", "edge_secret", "postgres_password")
        ]
        status = run("status", "--json", "--data", str(stack.data)).stdout
        text = status + (stack.data / "stack.json").read_text()
        assert all(secret and secret not in text for secret in secrets)
        assert "velikiy:***@/velikiy" in status
        assert "unix://default:***@/" in status


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:a:b@c@h:5/d", "postgresql://me:***@h:5/d"),
        ("postgresql://me@h/d?password=a%20b&sslmode=require", "postgresql://me@h/d?password=***&sslmode=require"),
        ("host=h password = 'it\\'s' dbname=d", "host=h password = *** dbname=d"),
        ("redis://:secret@h:6379/0", "redis://:***@h:6379/0"),
        ("redis://h:6379/0", "redis://h:6379/0"),
    ],
)
def test_address_is_shown_without_its_password(address: str, shown: str) -> None:
    assert masked(address) == shown


class TestConsoles:
    def test_psql_and_redis_open_without_a_typed_password(self, stack: Stack) -> None:
        row = run(
            "psql", "--data", str(stack.data), "--tuples-only", "--command", "SELECT name FROM users WHERE id = 1"
        )
        assert row.returncode == 0, row.stderr
        assert row.stdout.strip()
        assert run("redis", "--data", str(stack.data), "PING").stdout == "PONG\n"

    def test_no_password_is_an_argument_of_a_console(self, stack: Stack) -> None:
        waiting = ["--command", r"\! cat /proc/$PPID/cmdline"]
        arguments = run("psql", "--data", str(stack.data), *waiting).stdout
        assert "psql" in arguments
        assert stack.secret("app_password") not in arguments


class TestLeastRights:
    @pytest.mark.parametrize(
        "command",
        [
            "CONFIG SET dir /tmp",
            "SHUTDOWN NOSAVE",
            "REPLICAOF NO ONE",
            "MODULE LIST",
            "ACL LIST",
            "KEYS *",
        ],
    )
    def test_password_of_redis_permits_no_command_beyond_entries_and_scripts(self, stack: Stack, command: str) -> None:
        with stack.redis() as client, pytest.raises(NoPermissionError):
            client.execute_command(*command.split())

    def test_role_of_the_apps_is_no_superuser_and_creates_no_role(self, stack: Stack) -> None:
        rights = "rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls"
        assert stack.sql(f"SELECT {rights} FROM pg_roles WHERE rolname = current_user") == [(False,) * 5]


class TestImpostors:
    CLEARTEXT_PASSWORD = b"R" + (8).to_bytes(4, "big") + (3).to_bytes(4, "big")
    AUTHENTICATED = b"R" + (8).to_bytes(4, "big") + (0).to_bytes(4, "big")

    @pytest.mark.parametrize("reply", [CLEARTEXT_PASSWORD, AUTHENTICATED])
    def test_program_at_the_socket_of_postgresql_gets_no_password_in_clear(
        self, restartable_stack: Stack, reply: bytes
    ) -> None:
        """Only root and the account of the services can listen there; even then the password stays secret."""
        stack = restartable_stack
        with refusing(stack, "postgres"), recorded(stack.data / "run" / ".s.PGSQL.5432", reply) as sent:
            wait_until(lambda: len(sent) > 20)
            with suppress(subprocess.SubprocessError):
                run("velikiy", "cache", "show", "/users/1", "--data", str(stack.data))
        assert stack.secret("app_password").encode() not in b"".join(sent)
        assert not [message for message in sent if message[:1] in (b"p", b"Q", b"P")]

    def test_edge_takes_no_answer_from_a_program_on_the_port_of_an_app(self, restartable_stack: Stack) -> None:
        stack = restartable_stack
        ports = [urlsplit(app).port for app in stack.apps]
        with refusing(stack, "app1", "app2"), ExitStack() as strangers:
            for port in ports:
                strangers.enter_context(stranger_on_port(port or 0, FALSE_USER))
                assert requests.get(f"http://127.0.0.1:{port}/users/1", timeout=5).json()["name"] == "false"
            for path in ("/users/1", "/users?limit=1", "/livez", "/health"):
                response = requests.get(stack.edge + path, timeout=5)
                assert response.status_code in (502, 503)
                assert "false" not in response.text
            assert requests.post(f"{stack.edge}/users", json={"name": "a"}, timeout=5).status_code in (502, 503)

    @root_only
    @pytest.mark.parametrize(("name", "file"), [("redis", "redis.sock"), ("postgres", ".s.PGSQL.5432")])
    def test_nobody_takes_the_place_of_a_dead_data_server(self, restartable_stack: Stack, name: str, file: str) -> None:
        stack = restartable_stack
        expected = requests.get(f"{stack.app}/users/1", timeout=5).json()
        default_port = {"redis": 6379, "postgres": 5432}[name]
        with refusing(stack, name):
            assert attempts_of_nobody([stack.data / "run" / file]) == ["PermissionError"] * 3
            with stranger_on_port(default_port, b"+OK\r\n") as sent:
                for base in (stack.edge, stack.app):
                    response = requests.get(f"{base}/users/1", timeout=5)
                    assert response.status_code == 503 or response.json() == expected
            assert not sent


@root_only
class TestSockets:
    def test_nobody_connects_to_an_inner_socket_or_replaces_it(self, stack: Stack) -> None:
        names = [".s.PGSQL.5432", "redis.sock", "app1.sock", "app2.sock", "supervisor.sock"]
        sockets = [stack.data / "run" / name for name in names]
        assert all(path.is_socket() for path in sockets)
        assert attempts_of_nobody(sockets) == ["PermissionError"] * 3 * len(sockets)
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in sockets)

    def test_postgresql_and_redis_listen_on_no_port(self, stack: Stack) -> None:
        pids = stack.pids()
        assert listening_ports(pids["postgres"]) == listening_ports(pids["redis"]) == set()
        assert listening_ports(pids["app1"]) == {urlsplit(stack.apps[0]).port}

    def test_edges_reach_the_apps_at_their_sockets_only(self, stack: Stack) -> None:
        requests.get(f"{stack.edge}/users?limit=2", timeout=5)
        wait_until(lambda: '"app":"unix:../run/app' in stack.log("edge1"))
        assert '"app":"127.0.0.1' not in stack.log("edge1")


FALSE_USER = (
    b"HTTP/1.1 200 OK\r\nCache-Status: redis; fwd=uri-miss\r\nContent-Type: application/json\r\n"
    b'Content-Length: 16\r\nETag: "1"\r\n\r\n{"name":"false"}'
)

ATTEMPTS = """
import os, socket, sys
for path in sys.argv[1:]:
    for attempt in (socket.socket(socket.AF_UNIX).connect, os.unlink, socket.socket(socket.AF_UNIX).bind):
        try:
            attempt(path)
            print("done")
        except OSError as error:
            print(type(error).__name__)
"""


def attempts_of_nobody(sockets: list[Path]) -> list[str]:
    """Return what happens when another user connects to each socket, removes it, and listens there instead."""
    return as_nobody("/usr/bin/python3", "-c", ATTEMPTS, *map(str, sockets)).stdout.split()


@contextmanager
def stranger_on_port(port: int, reply: bytes) -> Iterator[list[bytes]]:
    """Listen on the port, send the reply to each request, and record the requests."""
    sent: list[bytes] = []

    class Stranger(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            sent.append(self.request.recv(4096))
            self.wfile.write(reply)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address, daemon_threads = True, True

    with Server(("127.0.0.1", port), Stranger) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield sent
        finally:
            server.shutdown()


def listening_ports(pid: int) -> set[int]:
    """Return the TCP ports at which the process listens."""
    links = (str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes}


@root_only
def test_another_user_cannot_register_an_edge_or_empty_its_cache(stack: Stack) -> None:
    before = stack.sql("SELECT name, epoch FROM caches ORDER BY name")
    control = stack.supervisor.plan.control_ports[0]
    [(instance_id,), *_] = stack.sql("SELECT split_part(name, '@', 1) FROM caches WHERE kind = 'edge' ORDER BY name")
    curl = ["curl", "--silent", "--noproxy", "*", "--output", "/dev/null", "--write-out", "%{http_code}"]
    form = f"instance_id={instance_id}&epoch=mine&port={control}"
    assert as_nobody(*curl, "--data", form, f"{stack.app}/.lease/register").stdout == "404"
    drop = ["--header", f"X-Edge: {instance_id}", "--data", "*", f"http://127.0.0.1:{control}/drop"]
    assert as_nobody(*curl, *drop).stdout == "401"
    assert stack.sql("SELECT name, epoch FROM caches ORDER BY name") == before


def test_stack_makes_its_own_edge_secret() -> None:
    with running("--apps", "1", EDGE_SECRET="") as stack:
        assert len(stack.secret("edge_secret")) >= 32
        assert stack.healthy()
