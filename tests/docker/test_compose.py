"""`docker compose up --build` (Compose v2), from a clean checkout, without other preparation.

The tests share one stack, and each test leaves the stack running. test_compose_v1.py has the essential tests for
Compose 1.29.
"""

import http.client
import json
import ssl
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from testkit.certificates import Authority
from velikiy.settings import Settings

from .engine import CHECKOUT, DEBIAN, Engine, docker, run
from .stack import ONE_SHOTS, SERVICES, Stack, is_free, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]

PASSWORDS = {
    "postgres_password": "postgres",
    "owner_password": "postgres",
    "app_password": "postgres",
    "redis_password": "redis",
}
"""Each password, and the service that can show it."""

SECRETS_OF = {
    "postgres": "app_password owner_password postgres_password",
    "redis": "redis.conf redis_password",
    "app": "database_url edge_secret redis_url",
    "relay": "database_url edge_secret redis_url",
    "edge": "edge_secret redis_url",
}
"""The secrets that each service may read. The container of the migrations has ended; its volume is listed below."""


class Tls:
    """A folder with a certificate, and the address of an edge that uses it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.authority = Authority(folder)
        self.cert, self.key = folder / "fullchain.pem", folder / "privkey.pem"
        self.authority.sign(self.cert, self.key)
        self.port = port
        self.url = f"https://127.0.0.1:{port}"

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=5, verify=str(self.authority.cert))

    def presented(self) -> str:
        """Return the certificate that the edge presents to a new client."""
        return ssl.get_server_certificate(("127.0.0.1", self.port), timeout=5)


@pytest.fixture(scope="module")
def stack(engine: Engine, checkout: Path) -> Iterator[Stack]:
    stack = Stack(engine.compose_v2, checkout)
    try:
        stack.up("--build")
        yield stack
    finally:
        stack.remove()


def test_compose_stack_passes_all_checks_of_test_app(stack: Stack) -> None:
    run(str(stack.checkout / "test_app.sh"), stack.url, limit=300)


def test_every_service_becomes_healthy_and_the_one_shots_exit_with_0(stack: Stack) -> None:
    for service in SERVICES:
        wait_until_healthy(stack, service)
    for service in ONE_SHOTS:
        assert stack.container(service)["State"]["Status"] == "exited"
        assert stack.container(service)["State"]["ExitCode"] == 0


def test_only_the_edge_is_published_and_only_on_this_machine(stack: Stack) -> None:
    published = {
        (service, port, binding["HostIp"], binding["HostPort"])
        for service in SERVICES
        for port, bindings in stack.container(service)["NetworkSettings"]["Ports"].items()
        for binding in bindings or []
    }
    assert published == {("edge", "8080/tcp", "127.0.0.1", str(stack.port))}


def test_the_default_address_is_port_80_of_this_machine(stack: Stack) -> None:
    if not is_free(80):
        pytest.skip("something else listens on port 80")
    stack.compose("up", "--detach", "--no-deps", "edge", settings={"PORT": ""})
    try:
        address = "http://localhost/health"
        wait_until(lambda: requests.get(address, timeout=5).status_code == 200, "http://localhost answers")
    finally:
        stack.up("--no-deps", "edge")


def test_every_container_is_confined(stack: Stack) -> None:
    for service in SERVICES + ONE_SHOTS:
        container = stack.container(service)
        host = container["HostConfig"]
        assert container["Config"]["User"].split(":")[0] not in ("", "0", "root"), service
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert not host["CapAdd"], service
        assert not host["Privileged"], service
        assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"]), service
        assert host["Memory"] > 0, service
        assert host["NanoCpus"] > 0, service
        assert host["PidsLimit"] > 0, service
        limits = {limit["Name"]: (limit["Soft"], limit["Hard"]) for limit in host["Ulimits"]}
        assert limits == {"nofile": (16384, 16384), "nproc": (4096, 4096), "core": (0, 0)}, service
    for service in SERVICES:
        assert stack.container(service)["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped", service


@pytest.mark.parametrize("service", SERVICES)
def test_no_process_is_root_or_has_a_capability_or_can_get_one(stack: Stack, service: str) -> None:
    processes = status_of_processes(stack, service)
    assert processes
    for process in processes:
        assert "0" not in process["Uid"].split() + process["Gid"].split(), process["Name"]
        for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(process[capabilities], 16) == 0, (process["Name"], capabilities)
        assert process["NoNewPrivs"] == "1", process["Name"]


@pytest.mark.parametrize("service", SERVICES)
def test_file_system_of_a_container_is_read_only(stack: Stack, service: str) -> None:
    container = stack.container(service)["Id"]
    for path in ("/new", "/usr/new", "/etc/new", "/run/secrets/new"):
        assert "Read-only file system" in docker("exec", container, "sh", "-c", f": > {path}", check=False)


def test_each_service_has_its_own_secrets_only(stack: Stack) -> None:
    for service, secrets in SECRETS_OF.items():
        assert stack.execute(service, "sh", "-c", "echo $(ls -A /run/secrets)") == secrets, service
        # Only the user of the service can read them, also if another container mounted the volume.
        modes = stack.execute(service, "sh", "-c", "stat -c %u:%g:%a /run/secrets /run/secrets/* | sort -u")
        group = {"postgres": 70, "redis": 1000, "edge": 10002}.get(service)
        folder, file = ("10001:10001:700", "10001:10001:400") if group is None else (f"{group}:750", f"{group}:440")
        assert sorted(modes.split()) == sorted([f"10001:{it}" if group else it for it in (folder, file)]), service
    shown = docker(
        *("run", "--rm", "--network", "none", "--volume", f"{stack.project}_migrate-secrets:/s:ro", DEBIAN),
        *("ls", "-A", "/s"),
    )
    assert shown == "migration_database_url"
    for service in (*SERVICES, "migrate"):
        assert f"{stack.project}_secrets" not in json.dumps(stack.container(service)["Mounts"]), service


def test_edge_reads_redis_itself(stack: Stack) -> None:
    user = f"{stack.url}/users/1"
    requests.put(user, json={"name": "Alice"}, timeout=10)
    response = requests.get(user, timeout=5)
    assert "redis; hit" in response.headers["Cache-Status"]
    line = f'"request_id":"{response.headers["X-Request-Id"]}"'
    wait_until(lambda: line in stack.compose("logs", "--no-color", "edge"), "the edge has logged it")
    assert line not in stack.compose("logs", "--no-color", "app")


def test_edge_reaches_the_app_and_redis_but_not_postgresql(stack: Stack) -> None:
    def reaches(address: str, port: int) -> bool:
        attempt = f"timeout 2 bash -c '</dev/tcp/{address}/{port}' 2>/dev/null && echo reached || true"
        return stack.execute("edge", "bash", "-c", attempt) == "reached"

    assert reaches("app", 5000)
    assert reaches("redis", 6379)
    assert not reaches("postgres", 5432)
    for network in stack.container("postgres")["NetworkSettings"]["Networks"].values():
        assert not reaches(network["IPAddress"], 5432)


@pytest.mark.parametrize(
    ("address", "metric"),
    [
        ("app:9100", "velikiy_app_requests_total"),
        ("relay:9100", "velikiy_relays_listening 1"),
        ("edge:8081", "velikiy_edge_requests_total"),
    ],
)
def test_prometheus_reads_the_metrics_of_each_container_inside(stack: Stack, address: str, metric: str) -> None:
    read = f"import urllib.request as it; print(it.urlopen('http://{address}/metrics', timeout=5).read().decode())"
    wait_until(lambda: metric in stack.execute("app", "python", "-c", read), f"{metric} at {address}")


def test_passwords_are_only_in_their_volume(stack: Stack) -> None:
    for name, password in passwords(stack).items():
        assert len(password) >= 24, name
        assert password not in (CHECKOUT / "compose.yaml").read_text(), name
        for service in SERVICES + ONE_SHOTS:
            assert password not in json.dumps(stack.container(service)), (name, service)
        assert password not in stack.compose("logs", "--no-color"), name


def test_backup_is_restored_into_the_running_service(stack: Stack, tmp_path: Path) -> None:
    stack.compose("build", "backup", limit=900)  # with stand-ins, Compose would look for the image in a registry
    tool = ["run", "--rm", "--no-deps", "-T", "backup"]
    user = stack.create(f"In the backup {uuid.uuid4().hex}")
    name = stack.name_of(user)
    stack.compose(*tool, "backup", "/backups/first.dump")
    stack.compose(*tool, "backup", "--to", "/backups", "--keep", "1")
    stack.rename(user, "Changed later")
    stack.compose(*tool, "restore", "/backups/first.dump", "--yes")
    assert stack.name_of(user) == name
    listed = stack.compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "ls -l /backups", "backup")
    assert listed.count("velikiy-") == 1
    assert listed.count("before-restore-") == 1
    assert listed.count("-rw-------") == 3

    def through_a_pipe(arguments: list[str], **streams: Any) -> None:
        subprocess.run(
            [*stack.command, *tool, *arguments], cwd=stack.checkout, env=stack.environment(), check=True, **streams
        )

    with (tmp_path / "velikiy.dump").open("wb") as file:
        through_a_pipe(["backup", "-"], stdout=file)
    stack.rename(user, "Changed once more")
    with (tmp_path / "velikiy.dump").open("rb") as backup:
        through_a_pipe(["restore", "-", "--yes", "--no-save"], stdin=backup)
    assert stack.name_of(user) == name


def test_database_is_utf8_and_knows_letters_of_other_alphabets(stack: Stack) -> None:
    assert stack.sql("SHOW server_encoding") == "UTF8"
    assert stack.sql("SELECT lower('ГЛЕБ') = 'глеб'") == "t"


def test_app_connects_as_a_role_without_rights_over_the_server(stack: Stack) -> None:
    rights = "rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls"
    assert stack.sql(f"SELECT {rights} FROM pg_roles WHERE rolname = 'velikiy'") == "f"
    assert stack.sql("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'velikiy'") == "velikiy_owner"
    assert stack.sql("SELECT DISTINCT usename FROM pg_stat_activity WHERE client_addr IS NOT NULL") == "velikiy"


def test_role_of_the_app_owns_nothing_and_changes_no_schema(stack: Stack) -> None:
    assert stack.sql("SELECT count(*) FROM pg_shdepend WHERE refobjid = 'velikiy'::regrole AND deptype = 'o'") == "0"
    attempt = "import psycopg; psycopg.connect(open('/run/secrets/database_url').read().strip()).execute('{}')"
    app = stack.container("app")["Id"]
    for statement in ("CREATE TABLE t (id int)", "DROP TABLE users", "ALTER TABLE users ADD c int", "TRUNCATE users"):
        output = docker("exec", app, "python", "-c", attempt.format(statement), check=False)
        assert "InsufficientPrivilege" in output, statement


def test_superuser_cannot_log_in_over_the_network(stack: Stack) -> None:
    password = passwords(stack)["postgres_password"]
    attempt = f"import psycopg; psycopg.connect('postgresql://postgres:{password}@postgres/postgres')"
    output = docker("exec", stack.container("app")["Id"], "python", "-c", attempt, check=False)
    assert 'password authentication failed for user "postgres"' in output


def test_env_example_as_env_file_changes_nothing(stack: Stack) -> None:
    plain = resolved(stack, {"PORT": ""})
    example = stack.checkout / ".env"
    example.write_text((stack.checkout / ".env.example").read_text())
    try:
        named = resolved(stack, {"PORT": ""})
    finally:
        example.unlink()
    for service in SERVICES:
        assert named["services"][service].get("ports") == plain["services"][service].get("ports")


def test_settings_reach_the_containers_that_use_them(stack: Stack) -> None:
    given = {
        "EDGE_TTL": "4",
        "REDIS_TTL": "59",
        "APP_WORKERS": "1",
        "APP_THREADS": "3",
        "LOG_LEVEL": "warning",
    }
    address = {"BIND": "127.0.0.9", "PORT": "8099"}
    services = resolved(stack, given | address)["services"]
    for name, value in given.items():
        assert services["app"]["environment"][name] == value
        assert services["relay"]["environment"][name] == value
    assert services["edge"]["environment"]["EDGE_TTL"] == "4"
    (port,) = services["edge"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.9", "8099", 8080)

    # Redis has a container of its own here: a refused connection does not prove that Redis is down.
    assert "REDIS_DIRECT" not in services["app"]["environment"]
    secret = {"database_url", "database_direct_url", "redis_url", "edge_secret"}
    of_others = {"redis_direct", "tls_cert", "tls_key", "tls_hsts"}
    for name in Settings.model_fields.keys() - secret - of_others:  # the edges alone know TLS (compose.tls.yaml)
        assert name.upper() in services["app"]["environment"]

    # A setting that is not set must not arrive as an empty value.
    environment = stack.container("app")["Config"]["Env"]
    assert not [entry for entry in environment if entry.startswith(("EDGE_TTL=", "LOG_LEVEL="))]


def test_level_reaches_postgres_and_redis(stack: Stack) -> None:
    services = resolved(stack, {"LOG_LEVEL": "WARNING"})["services"]
    assert "log_min_messages=WARNING" in services["postgres"]["command"]
    assert services["redis"]["environment"]["LOG_LEVEL"] == "WARNING"


def test_write_is_seen_by_the_next_read_with_compose(stack: Stack) -> None:
    user = stack.wait_until_it_works()
    for name in ("Глеб", "Зоя", "Инна"):
        stack.warm(user)
        assert stack.rename(user, name).status_code == 200
        assert stack.name_of(user) == name
    stack.warm(user)
    assert requests.delete(f"{stack.url}/users/{user}", timeout=10).status_code == 200
    assert not stack.reads(user)


def test_sql_from_outside_is_seen_within_two_seconds_with_compose(stack: Stack) -> None:
    user = stack.wait_until_it_works()
    stack.warm(user)
    stack.sql(f"UPDATE users SET name = 'From outside' WHERE id = {user}")
    wait_until(lambda: stack.name_of(user) == "From outside", "the new name is read", limit=2)


def test_cache_commands_show_and_purge_the_caches_from_inside_the_app(stack: Stack) -> None:
    stack.warm(1)
    shown = stack.execute("app", "python", "-m", "velikiy", "cache", "show", "/users/1")
    assert shown.startswith("/users/1") and " bytes, age " in shown
    assert "dropped everything" in stack.execute("app", "python", "-m", "velikiy", "cache", "purge", "--all")
    assert " bytes" not in stack.execute("app", "python", "-m", "velikiy", "cache", "show", "/users/1")


def test_users_are_imported_and_exported_through_pipes(stack: Stack) -> None:
    before = stack.sql("SELECT count(*) FROM users")
    rows = r"name,email\nPiped,piped@example.com\nPiped too,alice@example.com\n"
    command = "python -m velikiy users import - --rejects /tmp/rejects.ndjson"
    output = stack.execute("app", "sh", "-c", f"printf '{rows}' | {command} 2>&1; cat /tmp/rejects.ndjson")
    try:
        assert "imported 1, rejected 1" in output
        assert '"line":3' in output
        assert "piped@example.com" in stack.execute("app", "python", "-m", "velikiy", "users", "export", "-")
        assert requests.get(f"{stack.url}/users/count", timeout=5).json() == {"count": int(before) + 1}
    finally:
        stack.sql("DELETE FROM users WHERE email = 'piped@example.com'")


def test_killed_relay_comes_back_and_invalidates_after_sql_that_it_missed(stack: Stack) -> None:
    user = stack.wait_until_it_works()
    stack.warm(user)
    stack.kill("relay")
    stack.sql(f"UPDATE users SET name = 'Meanwhile' WHERE id = {user}")
    # Without the relay Redis would keep the old name for a minute.
    wait_until(lambda: stack.name_of(user) == "Meanwhile", "the new name is read", limit=20)
    wait_until_healthy(stack, "relay")


def test_edge_registers_with_its_address_in_the_inner_network(stack: Stack) -> None:
    networks = stack.container("edge")["NetworkSettings"]["Networks"]
    address = networks[f"{stack.project}_inside"]["IPAddress"]
    registered = f"SELECT count(*) FROM caches WHERE address = '{address}:8081' AND fenced_at IS NULL"
    wait_until(lambda: stack.sql(registered) == "1", "the edge is registered")


@pytest.fixture
def two_edges(stack: Stack) -> Iterator[tuple[str, str]]:
    """Start two edges and three apps. Return the addresses of the edges."""
    stack.up(
        *("--no-recreate", "--scale", "edge=2", "--scale", "app=3"),
        settings={"PORT": f"{stack.port}-{stack.port + 1}"},
    )
    first, second = addresses_of_edges(stack)
    wait_until(lambda: requests.get(f"{second}/readyz", timeout=5).ok, "the second edge works")
    yield first, second
    stack.up("--no-recreate", "--scale", "edge=1", "--scale", "app=1")
    assert addresses_of_edges(stack) == [stack.url]


def test_write_through_one_edge_is_seen_by_the_next_read_through_the_other(
    stack: Stack, two_edges: tuple[str, str]
) -> None:
    user = stack.wait_until_it_works()
    for round_number in range(20):
        for edge in two_edges:
            stack.warm(user, edge)
        writer, reader = two_edges if round_number % 2 else two_edges[::-1]
        assert stack.rename(user, f"Round {round_number}", writer).status_code == 200
        assert stack.name_of(user, reader) == f"Round {round_number}"


def test_edge_that_hangs_is_fenced_and_returns_with_no_old_entry(stack: Stack, two_edges: tuple[str, str]) -> None:
    first, second = two_edges
    hanging = stack.containers_in_order("edge")[1]
    address = hanging["NetworkSettings"]["Networks"][f"{stack.project}_inside"]["IPAddress"] + ":8081"
    user = stack.wait_until_it_works()
    stack.warm(user, second)
    before = stack.sql(f"SELECT epoch FROM caches WHERE address = '{address}'")
    docker("pause", hanging["Id"])
    try:
        assert stack.rename(user, "Excluded", first).status_code == 200
        # The edge is excluded, or its row is gone already: writers send no invalidation there.
        assert stack.sql(f"SELECT count(*) FROM caches WHERE address = '{address}' AND NOT excluded") == "0"
        # These requests wait when the edge continues, which does not know that time has passed.
        reads = [http.client.HTTPConnection(second.removeprefix("http://"), timeout=5) for _ in range(8)]
        for read in reads:
            read.request("GET", f"/users/{user}")
        docker("unpause", hanging["Id"])
        assert {json.loads(read.getresponse().read())["name"] for read in reads} == {"Excluded"}
    finally:
        docker("unpause", hanging["Id"], check=False)
    is_readmitted = f"SELECT epoch <> '{before}' FROM caches WHERE address = '{address}' AND fenced_at IS NULL"
    wait_until(lambda: stack.sql(is_readmitted) == "t", "the edge has registered again")
    stack.warm(user, second)
    assert stack.rename(user, "Invalidated", first).elapsed.total_seconds() < 1
    assert stack.name_of(user, second) == "Invalidated"


def test_three_apps_share_the_work(stack: Stack) -> None:
    stack.up("--no-recreate", "--scale", "app=3")
    try:
        assert len(stack.containers("app")) == 3
        request_ids: set[str] = set()

        def all_have_served() -> bool:
            # A path that was never requested, so that no cache has it.
            user = 10**17 + uuid.uuid4().int % 10**17
            request_ids.add(stack.get(f"/users/{user}").headers["X-Request-Id"])
            logs = [docker("logs", container["Id"]) for container in stack.containers("app")]
            return all(any(request in log for request in request_ids) for log in logs)

        wait_until(all_have_served, "each of the three apps has answered one of our requests")
    finally:
        stack.up("--no-recreate", "--scale", "app=1")
    assert len(stack.containers("app")) == 1


def test_stopped_redis_container_causes_no_failed_request(stack: Stack) -> None:
    user = stack.wait_until_it_works()
    stack.compose("stop", "redis")
    try:
        for name in ("Глеб", "Зоя", "Инна"):
            assert stack.rename(user, name).status_code == 200
            assert stack.name_of(user) == name
    finally:
        stack.compose("start", "redis")
    wait_until(stack.has_no_warnings, "Redis is back")


@pytest.fixture
def tls(stack: Stack, tmp_path: Path) -> Iterator[Tls]:
    """Replace the edge by an edge with TLS."""
    tmp_path.chmod(0o755)
    tls = Tls(tmp_path, stack.port + 1)
    overlay = ("--file", "compose.yaml", "--file", "compose.tls.yaml")
    settings = {"TLS_FOLDER": str(tmp_path), "HTTPS_PORT": str(tls.port)}
    stack.compose(*overlay, "up", "--detach", "--no-deps", "edge", settings=settings)
    try:
        yield tls
    finally:
        stack.up("--no-deps", "edge")


def test_edge_with_compose_tls_yaml_serves_https_and_follows_a_new_certificate(stack: Stack, tls: Tls) -> None:
    wait_until_healthy(stack, "edge")
    response = wait_until(lambda: tls.get("/users/1"), "the edge serves https")
    assert response.status_code == 200
    assert response.headers["Strict-Transport-Security"] == "max-age=31536000"
    curl = ("curl", "--silent", "--noproxy", "*", "--http2", "--cacert", str(tls.authority.cert))
    assert run(*curl, "--write-out", "%{http_version}", "--output", "/dev/null", f"{tls.url}/users/1") == "2"

    # A write over https is seen by the next read, and the edge caches.
    written = requests.put(f"{tls.url}/users/1", json={"name": "Alice"}, timeout=10, verify=str(tls.authority.cert))
    assert written.status_code == 200
    wait_until(lambda: tls.get("/users/1").headers["X-Cache-Status"] == "HIT", "a hit over https")

    # Plain HTTP is redirected from its own port and from the port for https.
    for port in (stack.port, tls.port):
        plain = requests.get(f"http://127.0.0.1:{port}/users/1", allow_redirects=False, timeout=5)
        assert (plain.status_code, plain.headers["Location"]) == (308, f"{tls.url}/users/1")
        assert stack.container("edge")["State"]["Health"]["Status"] == "healthy"

    before, started = tls.presented(), stack.container("edge")["State"]["StartedAt"]
    tls.authority.sign(tls.cert, tls.key)
    wait_until(lambda: tls.presented() != before, "new connections get the new certificate", limit=15)
    assert tls.get("/users/1").status_code == 200
    assert stack.container("edge")["State"]["StartedAt"] == started
    assert stack.container("edge")["State"]["Health"]["Status"] == "healthy"


@pytest.mark.parametrize("service", SERVICES)
def test_container_is_replaced_while_the_others_run(stack: Stack, service: str) -> None:
    before = identities(stack)
    stack.up("--no-deps", "--force-recreate", service)
    after = identities(stack)
    changed = {name for name in SERVICES if before[name] != after[name]}
    assert changed == {service}


@pytest.mark.parametrize("service", SERVICES)
def test_container_whose_process_is_killed_comes_back(stack: Stack, service: str) -> None:
    restarts = stack.container(service)["RestartCount"]
    stack.kill(service)
    wait_until(lambda: stack.container(service)["RestartCount"] > restarts, f"{service} was restarted")
    wait_until_healthy(stack, service)
    stack.wait_until_it_works()


def test_down_keeps_the_data_and_down_with_volumes_deletes_it(stack: Stack) -> None:
    user = stack.wait_until_it_works()
    first = passwords(stack)

    become_an_earlier_version(stack)
    stack.up()
    assert stack.reads(user)
    assert stack.sql("SELECT tableowner FROM pg_tables WHERE tablename = 'users'") == "velikiy_owner"
    kept = passwords(stack)
    assert kept.pop("owner_password") != first.pop("owner_password")
    assert kept == first

    stack.compose("down", "--volumes")
    stack.up()
    assert stack.get("/users/1").json()["name"] == "Alice"
    assert not stack.reads(user)
    second = passwords(stack)
    assert not set(first.values()) & set(second.values())


def become_an_earlier_version(stack: Stack) -> None:
    """Stop the stack, and leave its volumes as a version with one role and one volume of secrets would leave them."""
    stack.sql("REASSIGN OWNED BY velikiy_owner TO velikiy")
    stack.sql("DROP OWNED BY velikiy_owner; DROP ROLE velikiy_owner")
    stack.compose("down")
    docker("volume", "rm", *(f"{stack.project}_{name}-secrets" for name in ("app", "migrate", "postgres", "redis")))
    secrets = f"{stack.project}_secrets:/s"
    docker("run", "--rm", "--network", "none", "--volume", secrets, DEBIAN, "rm", "/s/owner_password")


def wait_until_healthy(stack: Stack, service: str) -> None:
    def status() -> str:
        return str(stack.container(service)["State"].get("Health", {}).get("Status"))

    wait_until(lambda: status() == "healthy", f"{service} is healthy")


def addresses_of_edges(stack: Stack) -> list[str]:
    bindings = [edge["NetworkSettings"]["Ports"]["8080/tcp"][0] for edge in stack.containers_in_order("edge")]
    return [f"http://127.0.0.1:{binding['HostPort']}" for binding in bindings]


def identities(stack: Stack) -> dict[str, tuple[str, str]]:
    """Return the container of each service and its start time. A restart changes only the time."""
    return {
        service: (container["Id"], container["State"]["StartedAt"])
        for service in SERVICES
        for container in [stack.container(service)]
    }


def passwords(stack: Stack) -> dict[str, str]:
    return {name: stack.execute(service, "cat", f"/run/secrets/{name}") for name, service in PASSWORDS.items()}


def resolved(stack: Stack, settings: dict[str, str]) -> dict[str, Any]:
    """Return the compose file as Compose reads it."""
    return dict(json.loads(stack.compose("config", "--format", "json", settings=settings)))


def status_of_processes(stack: Stack, service: str) -> list[dict[str, str]]:
    """Return /proc/<pid>/status of each process in the container."""
    text = stack.execute(service, "sh", "-c", "for f in /proc/[0-9]*/status; do cat $f; echo; done")
    return [
        dict(line.split(":\t", 1) for line in block.splitlines() if ":\t" in line)
        for block in text.split("\n\n")
        if block.strip()
    ]
