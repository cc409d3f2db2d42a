"""The commands of docs/production.md, typed in their order on a machine that boots, with real proxies.

Three things of the outside are replaced: the repository, the name of the server, and the authority that signs
certificates. The tests follow the document, section by section.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import machine as machines
from .engine import CHECKOUT, Engine, Say, docker
from .machine import DEBIAN_12, DEBIAN_13, Machine

pytestmark = [pytest.mark.bare, pytest.mark.boots, pytest.mark.timeout(1800)]

URL = "https://users.example.com/users"

PREPARATION = (Path(__file__).parent / "production" / "prepare.sh").read_text()

SIGNED_BY_CADDY = """
set -e
sed -i '1i { \\n local_certs \\n skip_install_trust \\n }' /etc/caddy/Caddyfile
"""

TRUST_CADDY = """
for attempt in $(seq 50); do
    root=$(find /var/lib/caddy -name root.crt 2> /dev/null)
    [ -n "$root" ] && break
    sleep 0.2
done
cp "$root" /usr/local/share/ca-certificates/caddy.crt
update-ca-certificates > /dev/null
"""

BEFORE = {"systemctl enable caddy": SIGNED_BY_CADDY, f"curl --fail {URL}": TRUST_CADDY}
"""The commands that the test types before a line of the section about Caddy."""

PROXIES = ("Caddy", "Nginx", "HAProxy")


def sections(document: str, language: str) -> dict[str, str]:
    """Return the blocks of each section that has some, by the title of the section."""
    found: dict[str, str] = {}
    parts = re.split(r"^#{2,3} (.*)$", (CHECKOUT / "docs" / document).read_text(), flags=re.MULTILINE)
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        code = "".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        if code:
            found[title] = code
    return found


COMMANDS = sections("production.md", "sh")


@pytest.fixture(scope="module", params=[DEBIAN_12, DEBIAN_13])
def machine(request: pytest.FixtureRequest, engine: Engine, checkout: Path, say: Say) -> Iterator[Machine]:
    """A machine whose repository of the document is the checkout under test."""
    with machines.image(request.param, say, machines.SYSTEMD) as image, machines.machine(image, boots=True) as machine:
        say(f"Typing docs/production.md ({request.param}).")
        docker("cp", f"{checkout}/.", f"{machine.name}:/srv/repository")
        machine.run(
            "apt-get update && apt-get install --yes --no-install-recommends git ca-certificates openssl", folder="/"
        )
        git = "git config --global user.email test@example.com; git config --global user.name test"
        offline = 'git config --global url."/srv/repository".insteadOf https://git.example.com/velikiy-flask.git'
        commit = "git init --quiet && git add --all && git commit --quiet -m test"
        machine.run(f"{git}; {offline}; {commit}", folder="/srv/repository")
        machine.run(PREPARATION, folder="/")
        yield machine


def typed(machine: Machine, script: str, folder: str = "/opt/velikiy-flask") -> str:
    return machine.run(f"set -e\n{script}", folder=folder, limit=900)


def test_each_section_with_commands_is_typed() -> None:
    others = {"Install", "Settings", "Start, now and at each boot", "Keys", "No proxy: TLS at the edges", "Monitoring"}
    assert set(COMMANDS) == {*others, *PROXIES, "Backups", "Apply changes", "Remove it"}


def test_server_from_nothing_runs_the_service(machine: Machine) -> None:
    typed(machine, COMMANDS["Install"], folder="/root")
    output = typed(machine, COMMANDS["Settings"] + COMMANDS["Start, now and at each boot"])
    assert '{"status":"healthy"}' in output.replace(" ", "")


def test_key_writes_and_no_key_does_not(machine: Machine) -> None:
    output = typed(machine, COMMANDS["Keys"])  # one shell, since the second block uses a variable of the first
    assert "first-client" in output
    users = "http://127.0.0.1:8080/users"
    listed = typed(machine, f"curl --fail --silent {users}")
    assert "Dora" in listed
    assert "Alice" not in listed
    assert typed(machine, f"curl -so /dev/null -w '%{{http_code}}' -X DELETE {users}/4") == "401"


@pytest.mark.parametrize("proxy", PROXIES)
def test_proxy_serves_https_and_reads_behind_it_are_never_stale(machine: Machine, proxy: str) -> None:
    commands = COMMANDS[proxy]
    if proxy == "Caddy":
        for line, script in BEFORE.items():
            assert f"\n{line}\n" in commands
            commands = commands.replace(f"\n{line}\n", f"\n({script})\n{line}\n")
    try:
        assert "Dora" in typed(machine, commands)
        assert_proxy_is_true(machine)
    finally:
        # Nginx stays switched on: ./run uninstall must keep its package.
        typed(machine, "systemctl stop nginx" if proxy == "Nginx" else f"systemctl disable --now {proxy.lower()}")


def assert_proxy_is_true(machine: Machine) -> None:
    """The proxy replaces the headers that the edge trusts, redirects plain HTTP, and stores nothing."""
    forged = typed(machine, f"curl -si -H 'X-Forwarded-Prefix: /forged' '{URL}?limit=1'")
    assert "/forged" not in forged
    plain = typed(machine, f"curl -so /dev/null -w '%{{http_code}} %{{redirect_url}}' {URL.replace('https', 'http')}")
    assert plain == f"308 {URL}"
    key = typed(machine, "./run velikiy keys rotate first-client 2> /dev/null")
    for name in ("Dora", "Dora II"):
        write = f"curl --fail -X PUT {URL}/4 -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json'"
        typed(machine, f"""{write} -d '{{"name": "{name}"}}'""")
        for _ in range(2):
            assert f'"{name}"' in typed(machine, f"curl --fail --silent {URL}/4")


@pytest.mark.parametrize("proxy", ["Caddy", "HAProxy"])
def test_example_with_a_path_prefix_serves_it(machine: Machine, proxy: str) -> None:
    """The examples of docs/proxies.md. tests/edge/test_proxies.py has Nginx."""
    example = sections("proxies.md", proxy.lower())[proxy]
    if proxy == "Caddy":
        example = "{\nlocal_certs\nskip_install_trust\n}\n" + example
        file = "/etc/caddy/Caddyfile"
    else:
        example = "defaults\n    timeout connect 5s\n    timeout client 9s\n    timeout server 9s\n" + example
        file = "/etc/haproxy/haproxy.cfg"
    try:
        typed(machine, f"cat > {file} <<'END'\n{example}\nEND\nsystemctl restart {proxy.lower()}")
        url = "https://users.example.com/api"
        document = typed(machine, f"curl --fail --silent --retry 5 --retry-all-errors {url}/openapi.json")
        assert "Dora" in typed(machine, f"curl --fail --silent {url}/users")
    finally:
        typed(machine, f"systemctl stop {proxy.lower()}")
    assert re.search(r'"servers": ?\[\{"url": ?"/api', document)


def test_edges_serve_https_themselves(machine: Machine) -> None:
    assert "Dora" in typed(machine, COMMANDS["No proxy: TLS at the edges"])


def test_backup_is_restored_for_practice(machine: Machine) -> None:
    output = typed(machine, COMMANDS["Backups"])
    assert "velikiy-backup.timer" in output
    assert "Dora" in output


def test_prometheus_watches_the_service(machine: Machine) -> None:
    assert "Ready" in typed(machine, COMMANDS["Monitoring"])


def test_changes_are_applied(machine: Machine) -> None:
    typed(machine, COMMANDS["Apply changes"])
    assert "Dora" in typed(machine, f"curl --fail --silent {URL}")


def test_removal_keeps_the_data_and_the_packages_that_the_operator_uses(machine: Machine) -> None:
    assert "PG_VERSION" in typed(machine, COMMANDS["Remove it"])
    assert typed(machine, "ls -d /var/cache/velikiy /etc/systemd/system/velikiy* 2> /dev/null || true") == ""
    state = "dpkg-query --show --showformat '${db:Status-Status} ${Package}\\n'"
    assert "installed redis-server" not in typed(machine, f"{state} redis-server || true")
    assert "installed nginx" in typed(machine, f"{state} nginx")


def test_service_that_is_installed_again_has_the_data(machine: Machine) -> None:
    typed(machine, "systemctl disable nginx; ./run install-service")
    assert "Dora" in typed(machine, f"curl --fail --silent {URL}")


def test_removal_with_the_data_leaves_nothing(machine: Machine) -> None:
    typed(machine, "./run uninstall --yes --delete-data")
    assert typed(machine, "ls -d /var/lib/velikiy /var/cache/velikiy 2> /dev/null || true") == ""
    assert typed(machine, "id velikiy 2>&1 || true") == "id: ‘velikiy’: no such user".replace("‘", "'").replace(
        "’", "'"
    )
