"""TLS at the edges: https with HTTP/2, redirects, certificates that change while the stack runs, and refusals."""

import json
import re
import shutil
import socket
import ssl
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
import urllib3

from testkit.certificates import Authority
from testkit.stack import ROOT, Stack, clean_environment, folder, free_ports, refused, run, running, start, wait_until


class Files:
    """A certificate and its key, as an operator keeps them."""

    def __init__(self, path: Path) -> None:
        path.chmod(0o755)
        self.authority = Authority(path)
        self.cert, self.key = path / "fullchain.pem", path / "privkey.pem"
        self.authority.sign(self.cert, self.key)

    @property
    def settings(self) -> dict[str, str]:
        return {"TLS_CERT": str(self.cert), "TLS_KEY": str(self.key)}


@pytest.fixture(scope="module")
def files() -> Iterator[Files]:
    with folder() as path:
        yield Files(path)


@pytest.fixture(scope="module")
def http_port() -> int:
    return free_ports(8) + 7


@pytest.fixture(scope="module")
def tls_stack(files: Files, http_port: int) -> Iterator[Stack]:
    with running("--edges", "2", HTTP_PORT=str(http_port), TLS_CERT=str(files.cert), TLS_KEY=str(files.key)) as stack:
        yield stack


@pytest.fixture
def client(files: Files) -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # a bundle of this machine would win over the next line
    session.verify = str(files.authority.cert)
    return session


def curl(files: Files, *arguments: str) -> str:
    """Send requests over HTTP/2, and return the headers and bodies of the responses."""
    return subprocess.run(
        ["curl", "--noproxy", "*", "-s", "-i", "--http2", "--cacert", str(files.authority.cert), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def presented(edge: str) -> bytes:
    """Return the certificate that the edge presents to a new client."""
    address = urlsplit(edge)
    context = ssl._create_unverified_context()
    connection = socket.create_connection((str(address.hostname), int(address.port or 443)), timeout=5)
    with connection, context.wrap_socket(connection) as tls:
        return tls.getpeercert(binary_form=True) or b""


def handshake(edge: str, version: ssl.TLSVersion) -> str | None:
    address = urlsplit(edge)
    context = ssl._create_unverified_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = context.maximum_version = version
    connection = socket.create_connection((str(address.hostname), int(address.port or 443)), timeout=5)
    with connection, context.wrap_socket(connection) as tls:
        return tls.version()


def read(files: Files, url: str) -> tuple[str, str]:
    """Return the cache's result of a read over HTTP/2, and its body."""
    head, _, body = curl(files, url).replace("\r\n", "\n").partition("\n\n")
    assert head.startswith("HTTP/2 200"), head
    return re.findall(r"x-cache-status: (\w+)", head)[0], body


class TestHttps:
    def test_every_edge_serves_https(self, tls_stack: Stack, client: requests.Session) -> None:
        for edge in tls_stack.edges:
            assert edge.startswith("https://127.0.0.1:")
            assert client.get(f"{edge}/users/1", timeout=5).json()["name"] == "Alice"

    def test_the_eight_checks_pass(self, tls_stack: Stack, files: Files) -> None:
        checks = subprocess.run(
            [str(ROOT / "test_app.sh"), tls_stack.edge],
            env=clean_environment(CURL_CA_BUNDLE=str(files.authority.cert)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert checks.returncode == 0, checks.stdout

    def test_write_is_seen_over_http2_through_the_other_edge(
        self, tls_stack: Stack, files: Files, client: requests.Session
    ) -> None:
        one, other = tls_stack.edges
        for number in range(20):
            client.put(f"{one}/users/2", json={"name": f"Bob {number}"}, timeout=5).raise_for_status()
            assert json.loads(read(files, f"{other}/users/2")[1])["name"] == f"Bob {number}"
        assert read(files, f"{other}/users/2")[0] == "HIT"

    def test_http2_uses_the_cache_for_rows_and_lists(self, tls_stack: Stack, files: Files) -> None:
        for path in ("/users/3", "/users", "/users?limit=2", "/users/count"):
            read(files, tls_stack.edge + path)
            assert read(files, tls_stack.edge + path)[0] == "HIT", path

    def test_writes_over_http2_have_bodies_with_and_without_a_length(self, tls_stack: Stack, files: Files) -> None:
        for body in (("-d", '{"name":"Carol"}'), ("-T", "-")):
            response = subprocess.run(
                [
                    "curl",
                    "--noproxy",
                    "*",
                    "-s",
                    "-i",
                    "-k",
                    "--http2",
                    "-X",
                    "PATCH",
                    *body,
                    "-H",
                    "Content-Type: application/json",
                    f"{tls_stack.edge}/users/3",
                ],
                input='{"name":"Carol"}',
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            assert response.startswith("HTTP/2 200"), response

    def test_each_request_of_an_http2_connection_has_an_id_of_its_own(self, tls_stack: Stack, files: Files) -> None:
        numbered = f"{tls_stack.edge}/users/[1000001-1000060]"
        ids = re.findall(r"(?m)^x-request-id: (\S+)", curl(files, "--parallel", numbered))
        assert len(ids) == len(set(ids)) == 60

    def test_tls_1_2_and_1_3_are_offered_and_older_versions_are_not(self, tls_stack: Stack) -> None:
        assert handshake(tls_stack.edge, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        assert handshake(tls_stack.edge, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises((ssl.SSLError, OSError)):
            handshake(tls_stack.edge, ssl.TLSVersion.TLSv1_1)

    def test_every_kind_of_response_has_hsts(self, tls_stack: Stack, client: requests.Session) -> None:
        for path in ("/users/1", "/users/1", "/users", "/nothing", "/users/0", "/docs", "/health", "/users/1?x=1"):
            headers = client.get(tls_stack.edge + path, timeout=5).headers
            assert headers["Strict-Transport-Security"] == "max-age=31536000", path

    def test_page_of_the_same_name_with_plain_http_may_not_write(
        self, tls_stack: Stack, client: requests.Session
    ) -> None:
        for origin, status in ((tls_stack.edge, 200), (tls_stack.edge.replace("https:", "http:"), 403)):
            response = client.put(
                f"{tls_stack.edge}/users/1", json={"name": "Alice"}, headers={"Origin": origin}, timeout=5
            )
            assert response.status_code == status, response.text


class TestRedirect:
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    def test_plain_http_is_redirected_with_308(self, tls_stack: Stack, http_port: int, method: str) -> None:
        for plain in (f"http://127.0.0.1:{http_port}", tls_stack.edge.replace("https:", "http:")):
            response = requests.request(method, f"{plain}/users?q=a%20b", data="x", timeout=5, allow_redirects=False)
            assert response.status_code == 308
            assert response.headers["Location"] == f"{tls_stack.edge}/users?q=a%20b"
            assert response.headers["Cache-Control"] == "private, no-cache"

    def test_plain_http_answers_nothing_else(self, http_port: int) -> None:
        for path in ("/.edge", "/readyz", "/.lease/renew"):
            response = requests.get(f"http://127.0.0.1:{http_port}{path}", timeout=5, allow_redirects=False)
            assert response.status_code == 308


class TestCertificates:
    def test_changed_files_are_presented_without_a_restart(
        self, tls_stack: Stack, files: Files, client: requests.Session
    ) -> None:
        pids = tls_stack.pids()
        before = presented(tls_stack.edge)
        client.get(f"{tls_stack.edge}/users/1", timeout=5)  # opens a connection, which stays
        files.authority.sign(files.cert, files.key)
        for edge in tls_stack.edges:
            for _ in range(2 * 4):  # each worker follows by itself
                wait_until(lambda edge=edge: presented(edge) not in (before, b""))  # type: ignore[misc]
        assert client.get(f"{tls_stack.edge}/users/1", timeout=5).status_code == 200
        assert tls_stack.pids() == pids

    def test_certificate_without_its_key_is_not_presented(self, tls_stack: Stack, files: Files) -> None:
        before = presented(tls_stack.edge)
        key = files.key.read_bytes()
        files.authority.sign(files.cert, files.key)
        new_key = files.key.read_bytes()
        files.key.write_bytes(key)
        wait_until(lambda: "does not fit the certificate" in tls_stack.log("edge1"))
        assert presented(tls_stack.edge) == before
        files.key.write_bytes(new_key)
        wait_until(lambda: presented(tls_stack.edge) != before)

    def test_certificate_that_expires_soon_is_a_warning(self, tls_stack: Stack, files: Files) -> None:
        files.authority.sign(files.cert, files.key, days=5)
        wait_until(lambda: "certificate of this edge expires in 4 days" in str(tls_stack.refresh()["warnings"]))
        files.authority.sign(files.cert, files.key, days=0)
        wait_until(lambda: "certificate of this edge" in str(tls_stack.refresh()["warnings"]))
        files.authority.sign(files.cert, files.key)
        wait_until(lambda: not tls_stack.refresh()["warnings"])

    def test_up_again_reports_that_the_stack_runs(self, tls_stack: Stack, files: Files, http_port: int) -> None:
        again = run(
            *["up", "--detach", "--data", str(tls_stack.data), "--port", tls_stack.port, "--edges", "2"],
            HTTP_PORT=str(http_port),
            **files.settings,
        )
        assert "already running" in again.stderr


class TestSelfSigned:
    def test_stack_with_a_certificate_of_its_own(self) -> None:
        with running("--tls-self-signed") as stack:
            own = stack.data / "tls/cert.pem"
            assert (stack.data / "tls/key.pem").stat().st_mode & 0o077 == 0
            context = ssl.create_default_context(cadata=own.read_text())
            address = urlsplit(stack.edge)
            with socket.create_connection((str(address.hostname), int(address.port or 0))) as connection:
                context.wrap_socket(connection, server_hostname="127.0.0.1").close()
            with warnings.catch_warnings(action="ignore", category=urllib3.exceptions.InsecureRequestWarning):
                response = requests.get(f"{stack.edge}/users/1", verify=False, timeout=5)
            assert "Strict-Transport-Security" not in response.headers
            again = start(stack)
            assert f"already running: {stack.edge}" in again.stderr
            assert "-tls-self-signed and TLS_CERT exclude" in refused(
                *["up", "--detach", "--data", str(stack.data), "--tls-self-signed"], TLS_CERT=str(own), TLS_KEY="/x"
            )


class TestRefusals:
    @pytest.fixture
    def broken(self) -> Iterator[Files]:
        with folder() as path:
            yield Files(path)

    def refusal(self, files: Files, **settings: str) -> str:
        with folder() as data:
            return refused("up", "--detach", "--data", str(data / "data"), **{**files.settings, **settings})

    def test_setting_without_its_partner(self, broken: Files) -> None:
        assert "TLS_CERT is set and TLS_KEY is not" in self.refusal(broken, TLS_KEY="")
        assert "TLS_KEY is set and TLS_CERT is not" in self.refusal(broken, TLS_CERT="")

    def test_path_that_is_not_absolute(self, broken: Files) -> None:
        assert "TLS_KEY='key.pem' is not allowed: it must be an absolute path" in self.refusal(
            broken, TLS_KEY="key.pem"
        )

    def test_missing_file(self, broken: Files) -> None:
        broken.key.unlink()
        assert f"TLS_KEY='{broken.key}' does not exist" in self.refusal(broken)

    def test_file_that_the_services_may_not_read(self, broken: Files) -> None:
        broken.key.chmod(0o000)
        shutil.chown(broken.key, 0)
        assert f"TLS_KEY='{broken.key}' cannot be read by the user" in self.refusal(broken)

    def test_file_that_is_no_certificate(self, broken: Files) -> None:
        broken.cert.write_text("no certificate")
        assert "contains no certificate in the PEM format" in self.refusal(broken)

    def test_file_that_is_no_key(self, broken: Files) -> None:
        broken.key.write_text("no key")
        assert "contains no private key in the PEM format" in self.refusal(broken)

    def test_key_of_another_certificate(self, broken: Files) -> None:
        cert = broken.cert.read_text()
        broken.authority.sign(broken.cert, broken.key)
        broken.cert.write_text(cert)
        assert "does not fit the certificate in TLS_CERT" in self.refusal(broken)
