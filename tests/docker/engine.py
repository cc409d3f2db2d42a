"""A Docker Engine and base images to test on, wherever that can be had.

The Engine that answers is used as it is. Where none does and we are root on Debian, the packages are
installed and an Engine is started for the time of the tests. Base images come from the registry; where no
registry answers, stand-ins under the official names are built from Debian packages, and their names are
given back to Debian's own at the end: nobody shall later mistake one for the official image.

    python -m tests.docker.engine      makes all that and leaves it there, for work by hand
"""

import contextlib
import hashlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
STANDINS = Path(__file__).resolve().parent / "standins"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "velikiy-tests"

DEBIAN = "debian:bookworm-slim"
BASE_IMAGES = {
    DEBIAN: None,  # by debootstrap
    "python:3.11-slim": "python",
    "postgres:15-alpine": "postgres",
    "redis:7-alpine": "redis",
}
STANDIN_LABEL = "velikiy.standin"
PROJECT_PREFIX = "velikiytest"

HOST_CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
HOST_OWN_CAS = Path("/usr/local/share/ca-certificates")

Say = Callable[[str], None]


class CommandFailed(Exception):
    """With the end of what it printed."""


class NotToBeHad(Exception):
    """Something that the tests need is not here and cannot be made here; the text says what and why."""


@dataclass
class Engine:
    """An Engine that answers, and what was found or made for it."""

    version: str
    started_by_us: bool
    standins: list[str] = field(default_factory=list)
    compose_v2: list[str] = field(default_factory=list)
    compose_v1: list[str] = field(default_factory=list)


def run(*command: str, limit: float = 120, check: bool = True, **options: object) -> str:
    """What the command printed (both streams, stripped); its failure carries that text."""
    result = subprocess.run(  # type: ignore[call-overload]
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit, **options
    )
    if check and result.returncode != 0:
        raise CommandFailed(f"{' '.join(command)}: exit status {result.returncode}\n{_tail(result.stdout)}")
    return str(result.stdout).strip()


def docker(*arguments: str, limit: float = 120, check: bool = True) -> str:
    return run("docker", *arguments, limit=limit, check=check)


def _tail(text: str, lines: int = 60) -> str:
    return "\n".join(text.splitlines()[-lines:])


# --- the Engine


@contextlib.contextmanager
def engine_for_tests(say: Say) -> Iterator[Engine]:
    """An Engine with base images and both Composes; what we started or named for it is undone at the end."""
    version = engine_version()
    if version:
        say(f"Docker Engine {version} is running: it is used and left running.")
        yield from _with_images(Engine(version, started_by_us=False), say)
        return

    _install_engine(say)
    with _own_engine(say) as version:
        _remove_leftovers(say)
        yield from _with_images(Engine(version, started_by_us=True), say)


def engine_version() -> str:
    """The version of the Engine that answers, else nothing."""
    with contextlib.suppress(OSError, CommandFailed, subprocess.TimeoutExpired):
        return run("docker", "version", "--format", "{{.Server.Version}}", limit=10)
    return ""


@contextlib.contextmanager
def _own_engine(say: Say) -> Iterator[str]:
    daemon, log, runtime = _start_engine(say)
    try:
        yield engine_version()
    finally:
        say("Stopping the Docker Engine that was started for the tests.")
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(60)
        except subprocess.TimeoutExpired:
            daemon.kill()
            say(f"It did not stop within 60 s and was killed; its log is {log}.")
        shutil.rmtree(runtime, ignore_errors=True)


def _install_engine(say: Say) -> None:
    _install({"dockerd": "docker.io", "iptables": "iptables"}, say)
    _install({"docker": "docker-cli"}, say)  # since Debian 13 a package of its own


def _start_engine(say: Say) -> tuple[subprocess.Popen[bytes], Path, Path]:
    if os.geteuid() != 0:
        raise NotToBeHad("No Docker Engine answers, and only root can start one.")
    CACHE.mkdir(parents=True, exist_ok=True)
    log = CACHE / "dockerd.log"
    # A folder of its own for pid files: a stale one from an Engine that was killed would stop the start.
    runtime = Path(tempfile.mkdtemp(prefix="velikiy-dockerd-", dir="/run"))
    say(f"Starting a Docker Engine for the tests; its log is {log}.")
    with log.open("wb") as stream:
        daemon = subprocess.Popen(
            ["dockerd", "--exec-root", str(runtime), "--pidfile", str(runtime / "dockerd.pid")],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the tests, which then stop the Engine in their own order
        )
    deadline = time.monotonic() + 60
    while not engine_version():
        if daemon.poll() is not None or time.monotonic() > deadline:
            daemon.kill()
            last = _tail(log.read_text(errors="replace"), 5)
            raise NotToBeHad(f"The Docker Engine does not start. The end of {log}:\n{last}")
        time.sleep(0.2)
    return daemon, log, runtime


def _remove_leftovers(say: Say) -> None:
    """Stacks and bare machines of an earlier run that was killed; only for an Engine that nobody else can be using."""
    projects = docker("ps", "--all", "--format", '{{.Label "com.docker.compose.project"}}').splitlines()
    for project in sorted({name for name in projects if name.startswith(PROJECT_PREFIX)}):
        say(f"Removing {project}, left behind by a run that was killed.")
        remove_project(project)
    machines = docker("ps", "--all", "--quiet", "--filter", f"name=^{PROJECT_PREFIX}").split()
    if machines:
        docker("rm", "--force", "--volumes", *machines)


def remove_project(project: str) -> None:
    """All containers, networks and volumes of one Compose project, without its compose file."""
    mine = f"label=com.docker.compose.project={project}"
    for listing, removal in (
        (("ps", "--all", "--quiet"), ("rm", "--force", "--volumes")),
        (("network", "ls", "--quiet"), ("network", "rm")),
        (("volume", "ls", "--quiet"), ("volume", "rm", "--force")),
    ):
        found = docker(*listing, "--filter", mine).split()
        if found:
            docker(*removal, *found)


# --- packages


def _install(programs: dict[str, str], say: Say) -> None:
    """Debian packages for those programs that are missing, changing nothing else on the machine."""
    packages = sorted({package for program, package in programs.items() if not _which(program)})
    if not packages:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NotToBeHad(
            f"Missing: {', '.join(packages)}. As root on Debian the tests install that by themselves;"
            f" else: apt-get install {' '.join(packages)}"
        )
    say(f"Installing {', '.join(packages)}.")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"}
    with _no_services_started():
        run("apt-get", "update", "--quiet", limit=300, env=quiet)
        run(
            *("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", "--no-remove"),
            *("--no-upgrade", "-o", "Dpkg::Options::=--force-confold", *packages),
            limit=600,
            env=quiet,
        )


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@contextlib.contextmanager
def _no_services_started() -> Iterator[None]:
    """Installing a package starts its server; this is Debian's own switch against that."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


# --- base images


def _with_images(engine: Engine, say: Say) -> Iterator[Engine]:
    named_by_us = [name for name in _base_images(say) if _standin_mark(name)]
    try:
        engine.standins = [name for name in BASE_IMAGES if _standin_mark(name)]
        engine.compose_v2 = _compose_v2(say)
        engine.compose_v1 = _compose_v1(say)
        yield engine
    finally:
        for name in named_by_us:
            docker("rmi", name, check=False)
        if engine.standins:  # builds of theirs that a newer one has replaced
            docker("image", "prune", "--force", "--filter", f"label={STANDIN_LABEL}", check=False)


def _base_images(say: Say) -> list[str]:
    """Makes sure that all base images are there; returns those names that were not there before."""
    outdated = [name for name in BASE_IMAGES if _standin_mark(name) not in (None, _recipe())]
    for name in outdated:
        docker("rmi", "--force", name)
    missing = [name for name in BASE_IMAGES if _image(name) is None]
    if missing and not _pull(missing, say):
        lacking = [name for name in BASE_IMAGES if _image(name) is None]
        if DEBIAN in lacking:  # what the others are made of
            _make_standin(DEBIAN, say)
            lacking.remove(DEBIAN)
        with ThreadPoolExecutor() as pool:  # each waits for its downloads most of the time
            list(pool.map(lambda name: _make_standin(name, say), lacking))
    return missing


def _image(name: str) -> dict[str, object] | None:
    try:
        found = json.loads(docker("image", "inspect", name))
    except CommandFailed:
        return None
    return dict(found[0])


def _standin_mark(name: str) -> str | None:
    """The recipe's mark if the image of this name is a stand-in of ours, else nothing."""
    image = _image(name)
    labels = (image or {}).get("Config", {}).get("Labels") or {}  # type: ignore[attr-defined]
    return labels.get(STANDIN_LABEL)


def _pull(names: Sequence[str], say: Say) -> bool:
    limit = 60.0  # for the first, which tells whether there is a registry at all
    for name in names:
        say(f"Pulling {name}.")
        try:
            docker("pull", "--quiet", name, limit=limit)
        except (CommandFailed, subprocess.TimeoutExpired):
            say("No image registry answers.")
            return False
        limit = 900.0
    return True


def _recipe() -> str:
    """A mark of what the stand-ins are made from: with another recipe or other CAs they are made anew."""
    digest = hashlib.sha256()
    for path in sorted(path for path in STANDINS.rglob("*") if path.is_file()):
        digest.update(path.relative_to(STANDINS).as_posix().encode() + path.read_bytes())
    for path in _host_cas():
        digest.update(path.read_bytes())
    digest.update(inspect.getsource(_import_debian).encode())
    return digest.hexdigest()[:16]


def _host_cas() -> list[Path]:
    return sorted(HOST_OWN_CAS.glob("*.crt"))


def _make_standin(name: str, say: Say) -> None:
    kept = "velikiy-standin/" + name  # stays when the official name is given back: the cache of later runs
    if _standin_mark(kept) != _recipe():
        say(f"Building a stand-in for {name} from Debian packages.")
        started = time.monotonic()
        folder = BASE_IMAGES[name]
        if folder is None:
            _import_debian(kept)
        else:
            label = f"{STANDIN_LABEL}={_recipe()}"
            build(STANDINS / folder, "--tag", kept, "--label", label)
        say(f"  {name} is ready after {time.monotonic() - started:.0f} s")
    docker("tag", kept, name)


def build(context: Path, *arguments: str) -> str:
    """A build with the legacy builder, which Debian's Engine has; its output."""
    legacy = os.environ | {"DOCKER_BUILDKIT": "0"}
    return run("docker", "build", *arguments, str(context), limit=900, env=legacy)


def _import_debian(name: str) -> None:
    _install({"debootstrap": "debootstrap"}, lambda _: None)
    with tempfile.TemporaryDirectory(prefix="velikiy-debootstrap-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        mirrors = _debian_sources()
        mirror = [mirrors["bookworm"]] if "bookworm" in mirrors else []  # else debootstrap's own default
        run("debootstrap", "--variant=minbase", "bookworm", folder, *mirror, limit=900)

        if mirror:
            lines = [f"deb {uri} {suite} main\n" for suite, uri in mirrors.items()]
            (root / "etc/apt/sources.list").write_text("".join(lines))
        policy = root / "usr/sbin/policy-rc.d"  # as in the official image: installing starts no server
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        # As there too: an image need not outlive a power cut, and dpkg waits for the disk after each file.
        (root / "etc/dpkg/dpkg.cfg.d/docker-apt-speedup").write_text("force-unsafe-io\n")
        shutil.rmtree(root / "var/lib/apt/lists")
        (root / "var/lib/apt/lists/partial").mkdir(parents=True)
        for of_the_host in ("etc/resolv.conf", "etc/hostname"):
            (root / of_the_host).unlink(missing_ok=True)
        # The host's CA bundle, so that what the host can fetch through TLS can be fetched in a build too;
        # and its own CAs, which the package ca-certificates would else drop from the bundle.
        if _host_cas():
            own = root / HOST_OWN_CAS.relative_to("/")
            own.mkdir(parents=True, exist_ok=True)
            for path in _host_cas():
                shutil.copy(path, own)
        if HOST_CA_BUNDLE.exists():
            bundle = root / HOST_CA_BUNDLE.relative_to("/")
            bundle.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOST_CA_BUNDLE, bundle)

        archive = subprocess.Popen(
            ["tar", "--directory", folder, "--numeric-owner", "--create", "."], stdout=subprocess.PIPE
        )
        run(
            *("docker", "import", "--change", 'CMD ["bash"]'),
            *("--change", f"LABEL {STANDIN_LABEL}={_recipe()}", "-", name),
            stdin=archive.stdout,
            limit=300,
        )
        if archive.wait() != 0:
            raise NotToBeHad("tar could not read the Debian base system.")


def _debian_sources() -> dict[str, str]:
    """Where this machine gets Debian 12's packages: suite -> mirror; empty if it gets none."""
    listing = run(
        "apt-get",
        "indextargets",
        "--format",
        "$(ORIGIN) $(CODENAME) $(COMPONENT) $(SITE) $(REPO_URI)",
        "Created-By: Packages",
        check=False,
    )
    sources: dict[str, str] = {}
    for line in listing.splitlines():
        match line.split():
            case ["Debian", "bookworm" | "bookworm-updates" | "bookworm-security" as suite, "main", _, uri]:
                sources[suite] = uri.rstrip("/")
    return sources


# --- Compose


def _compose_v2(say: Say) -> list[str]:
    """`docker compose` where it is; else Debian 13's, unpacked into the cache and not installed."""
    with contextlib.suppress(CommandFailed):
        docker("compose", "version")
        return ["docker", "compose"]
    program = CACHE / "compose-v2/unpacked/usr/libexec/docker/cli-plugins/docker-compose"
    if not program.exists():
        say("Fetching Compose v2 from Debian 13 (unpacked, not installed).")
        _fetch_compose_v2(CACHE / "compose-v2")
    run(str(program), "version")
    return [str(program)]


def _fetch_compose_v2(folder: Path) -> None:
    mirror = _debian_sources().get("bookworm")
    if not mirror:
        raise NotToBeHad("Compose v2 is not here (the Docker package docker-compose-plugin brings it).")
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("lists/partial", "cache/archives/partial", "sources", "download"):
        (folder / part).mkdir(parents=True)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (folder / "sources/trixie.list").write_text(f"deb [signed-by={keys}] {mirror} trixie main\n")
    apart = {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": folder / "sources",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
    }
    options = [part for key, value in apart.items() for part in ("-o", f"{key}={value}")]
    run("apt-get", *options, "update", limit=300)
    run("apt-get", *options, "download", "docker-compose", limit=300, cwd=folder / "download")
    package = next((folder / "download").glob("docker-compose_*.deb"))
    run("dpkg", "--extract", str(package), str(folder / "unpacked"))


def _compose_v1(say: Say) -> list[str]:
    """`docker-compose` 1.29.2, as Debian 12 packages it; nothing where there is only a newer one."""
    _install({"docker-compose": "docker-compose"}, say)
    version = run("docker-compose", "version", "--short")
    return ["docker-compose"] if version.startswith("1.") else []


def main() -> None:
    def say(text: str) -> None:
        print(text, flush=True)

    if not engine_version():
        _install_engine(say)
        _start_engine(say)
    _base_images(say)
    say(f"Stand-ins: {', '.join(name for name in BASE_IMAGES if _standin_mark(name)) or 'none'}")
    say(f"Compose: {' '.join(_compose_v2(say))} and {' '.join(_compose_v1(say))}")


if __name__ == "__main__":
    try:
        main()
    except NotToBeHad as reason:
        sys.exit(str(reason))
