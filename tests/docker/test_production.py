"""The commands of docs/production.md, typed in their order on a machine that boots, with real proxies.

Three things of the outside are replaced: the repository, the name of the server, and the authority that signs
certificates.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import machine as machines
from .engine import CHECKOUT, Engine, Say, docker
from .machine import DEBIAN_12, DEBIAN_13, Machine

pytestmark = [pytest.mark.bare, pytest.mark.timeout(1800)]

DOCUMENT = CHECKOUT / "docs" / "production.md"

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

BEFORE = {"systemctl enable caddy": SIGNED_BY_CADDY, "curl --fail https://users.example.com/users": TRUST_CADDY}
"""The commands that the test types before a line of the section about Caddy."""


def sections() -> dict[str, str]:
    """Return the commands of each section that has some, by the title of the section."""
    found: dict[str, str] = {}
    parts = re.split(r"^#{2,3} (.*)$", DOCUMENT.read_text(), flags=re.MULTILINE)
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        code = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        if code:
            found[title] = code
    return found


@pytest.fixture(scope="module", params=[pytest.param(DEBIAN_12, marks=pytest.mark.long), DEBIAN_13])
def machine(request: pytest.FixtureRequest, engine: Engine, checkout: Path, say: Say) -> Iterator[Machine]:
    with machines.image(request.param, say, machines.SYSTEMD) as image, machines.machine(image, boots=True) as machine:
        say(f"Typing docs/production.md ({request.param}).")
        docker("cp", f"{checkout}/.", f"{machine.name}:/srv/repository")
        yield machine


def typed(machine: Machine, script: str, folder: str = "/opt/velikiy-flask") -> str:
    return machine.run(f"set -e\n{script}", folder=folder, limit=900)


def test_commands_of_the_document_lead_from_nothing_to_a_service(machine: Machine, say: Say) -> None:
    commands = sections()
    proxies = ["Caddy", "Nginx", "HAProxy", "No proxy: TLS at the edges"]
    assert set(proxies) < set(commands)

    # The repository of the document is the checkout under test.
    git = "git config --global user.email test@example.com; git config --global user.name test"
    offline = 'git config --global url."/srv/repository".insteadOf https://git.example.com/velikiy-flask.git'
    machine.run(
        "apt-get update && apt-get install --yes --no-install-recommends git ca-certificates openssl", folder="/"
    )
    machine.run(
        f"{git}; {offline}; git init --quiet && git add --all && git commit --quiet -m test", folder="/srv/repository"
    )
    machine.run(PREPARATION, folder="/")

    typed(machine, commands["Install"], folder="/root")
    output = typed(machine, commands["Settings"] + commands["Start, now and at each boot"])
    assert '{"status":"healthy"}' in output.replace(" ", "")

    # One shell, since the second block of the section uses a variable of the first.
    output = typed(machine, commands["Keys"])
    assert "first-client" in output
    users = "http://127.0.0.1:8080/users"
    assert "Dora" in typed(machine, f"curl --fail --silent {users}")
    assert "Alice" not in typed(machine, f"curl --fail --silent {users}")
    assert typed(machine, f"curl -so /dev/null -w '%{{http_code}}' -X DELETE {users}/4") == "401"

    for title in proxies:
        say(f"  {title}")
        assert "Dora" in typed(machine, with_stand_ins(title, commands[title])), title
        if title.startswith("No proxy"):
            continue
        assert_proxy_is_true(machine)
        typed(machine, f"systemctl disable --now {title.lower()}")

    output = typed(machine, commands["Monitoring"])
    assert "Prometheus" in output
    for title in ("Apply changes", "Remove it"):
        say(f"  {title}")
        output = typed(machine, commands[title])
    assert "PG_VERSION" in output
    assert typed(machine, "ls -d /var/cache/velikiy /etc/systemd/system/velikiy* 2> /dev/null || true") == ""
    assert "installed" not in typed(
        machine, "dpkg-query -W -f '${db:Status-Status}\\n' redis-server 2> /dev/null || true"
    )


def with_stand_ins(title: str, commands: str) -> str:
    if title != "Caddy":
        return commands
    for line, script in BEFORE.items():
        assert f"\n{line}\n" in commands
        commands = commands.replace(f"\n{line}\n", f"\n({script})\n{line}\n")
    return commands


def assert_proxy_is_true(machine: Machine) -> None:
    """The proxy replaces the headers that the edge trusts, redirects plain HTTP, and keeps no read of its own."""
    url = "https://users.example.com/users"
    forged = typed(machine, f"curl -si -H 'X-Forwarded-Prefix: /forged' '{url}?limit=1'")
    assert "/forged" not in forged
    plain = typed(machine, "curl -so /dev/null -w '%{http_code} %{redirect_url}' http://users.example.com/users")
    assert re.fullmatch(rf"30[18] {url}", plain)
    for name in ("Dora", "Dora the second"):
        key = "$(./run velikiy keys rotate first-client)"
        body = f'{{"name": "{name}"}}'
        write = f"curl --fail -X PUT {url}/4 -H \"Authorization: Bearer {key}\" -H 'Content-Type: application/json'"
        typed(machine, f"{write} -d '{body}'")
        assert f'"{name}"' in typed(machine, f"curl --fail --silent {url}/4")
    typed(machine, f"curl --fail --silent {url} > /dev/null; tail -n 3 /var/lib/velikiy/logs/edge1.log")
