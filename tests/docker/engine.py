"""Provide a Docker Engine and base images for the tests.

If an Engine runs, the tests use that Engine. Otherwise root on Debian installs the packages and starts an Engine for
the time of the tests.

Base images come from the registry. If no registry answers, stand-ins with the official names are built from Debian
packages. Their official names are removed at the end, so that no later build takes a stand-in for the official image.

    python -m tests.docker.engine      prepares the Engine and the images for work by hand, and keeps them
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
DEBIAN_13 = "debian:trixie-slim"
BASE_IMAGES = {
    DEBIAN: None,  # debootstrap makes it
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
    """A command failed. The text contains the end of its output."""


class Unavailable(Exception):
    """The tests need something that is missing and cannot be created here. The text names it and the reason."""


@dataclass
class Engine:
    """A running Engine, with the stand-ins and the Compose commands that were found or made for it."""

    version: str
    started_by_us: bool
    standins: list[str] = field(default_factory=list)
    compose_v2: list[str] = field(default_factory=list)
    compose_v1: list[str] = field(default_factory=list)


def run(*command: str, limit: float = 120, check: bool = True, **options: object) -> str:
    """Run a command and return its output: both streams, stripped.

    Raises:
        CommandFailed: The exit status is not 0.
    """
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
    """Provide an Engine with base images and both versions of Compose. Undo all changes at the end."""
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
    """Return the version of the running Engine, or an empty string if none runs."""
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
    _install({"docker": "docker-cli"}, say)  # Debian 13 packages it separately


def _start_engine(say: Say) -> tuple[subprocess.Popen[bytes], Path, Path]:
    if os.geteuid() != 0:
        raise Unavailable("No Docker Engine answers, and only root can start one.")
    CACHE.mkdir(parents=True, exist_ok=True)
    log = CACHE / "dockerd.log"
    # A new folder for pid files: a stale pid file of a killed Engine would prevent the start.
    runtime = Path(tempfile.mkdtemp(prefix="velikiy-dockerd-", dir="/run"))
    say(f"Starting a Docker Engine for the tests; its log is {log}.")
    with log.open("wb") as stream:
        daemon = subprocess.Popen(
            ["dockerd", "--exec-root", str(runtime), "--pidfile", str(runtime / "dockerd.pid")],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must reach only the tests, which stop the Engine in order
        )
    deadline = time.monotonic() + 60
    while not engine_version():
        if daemon.poll() is not None or time.monotonic() > deadline:
            daemon.kill()
            last = _tail(log.read_text(errors="replace"), 5)
            raise Unavailable(f"The Docker Engine does not start. The end of {log}:\n{last}")
        time.sleep(0.2)
    return daemon, log, runtime


def _remove_leftovers(say: Say) -> None:
    """Remove the stacks and bare machines of an earlier run that was killed. Call this only for an Engine of our own,
    which no other tests can be using."""
    projects = docker("ps", "--all", "--format", '{{.Label "com.docker.compose.project"}}').splitlines()
    for project in sorted({name for name in projects if name.startswith(PROJECT_PREFIX)}):
        say(f"Removing {project}, left behind by a run that was killed.")
        remove_project(project)
    machines = docker("ps", "--all", "--quiet", "--filter", f"name=^{PROJECT_PREFIX}").split()
    if machines:
        docker("rm", "--force", "--volumes", *machines)


def remove_project(project: str) -> None:
    """Remove all containers, networks and volumes of a Compose project, without its compose file."""
    label = f"label=com.docker.compose.project={project}"
    for listing, removal in (
        (("ps", "--all", "--quiet"), ("rm", "--force", "--volumes")),
        (("network", "ls", "--quiet"), ("network", "rm")),
        (("volume", "ls", "--quiet"), ("volume", "rm", "--force")),
    ):
        found = docker(*listing, "--filter", label).split()
        if found:
            docker(*removal, *found)


# --- packages


def _install(programs: dict[str, str], say: Say) -> None:
    """Install the Debian packages of missing programs. Change nothing else on the machine."""
    packages = sorted({package for program, package in programs.items() if not _which(program)})
    if not packages:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable(
            f"Missing: {', '.join(packages)}. As root on Debian the tests install these packages themselves;"
            f" otherwise run: apt-get install {' '.join(packages)}"
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
    """Prevent Debian from starting the servers of the packages that the block installs (policy-rc.d)."""
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
        if engine.standins:  # remove builds that newer builds have replaced
            docker("image", "prune", "--force", "--filter", f"label={STANDIN_LABEL}", check=False)


def _base_images(say: Say) -> list[str]:
    """Ensure that all base images exist. Return the names of the images that were missing."""
    outdated = [name for name in BASE_IMAGES if _standin_mark(name) not in (None, _recipe())]
    for name in outdated:
        docker("rmi", "--force", name)
    missing = [name for name in BASE_IMAGES if _image(name) is None]
    if missing and not _pull(missing, say):
        lacking = [name for name in BASE_IMAGES if _image(name) is None]
        if DEBIAN in lacking:  # the other stand-ins build on it
            _make_standin(DEBIAN, say)
            lacking.remove(DEBIAN)
        with ThreadPoolExecutor() as pool:  # each build mostly waits for downloads
            list(pool.map(lambda name: _make_standin(name, say), lacking))
    return missing


@contextlib.contextmanager
def debian_13(say: Say) -> Iterator[str]:
    """Provide the image of Debian 13, which few tests need."""
    is_ours = _image(DEBIAN_13) is None or _standin_mark(DEBIAN_13) not in (None, _recipe())
    if is_ours and not _pull([DEBIAN_13], say):
        _make_standin(DEBIAN_13, say)
    try:
        yield DEBIAN_13
    finally:
        if is_ours and _standin_mark(DEBIAN_13):
            docker("rmi", DEBIAN_13, check=False)


def _image(name: str) -> dict[str, object] | None:
    try:
        found = json.loads(docker("image", "inspect", name))
    except CommandFailed:
        return None
    return dict(found[0])


def _standin_mark(name: str) -> str | None:
    """Return the mark of the recipe if the image is a stand-in, else None."""
    image = _image(name)
    labels = (image or {}).get("Config", {}).get("Labels") or {}  # type: ignore[attr-defined]
    return labels.get(STANDIN_LABEL)


def _pull(names: Sequence[str], say: Say) -> bool:
    limit = 60.0  # for the first image, which shows whether a registry answers
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
    """Return a digest of the files that stand-ins are built from, and of the CAs. Another digest causes a new build."""
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
    kept = "velikiy-standin/" + name  # stays when the official name is removed, as a cache for later runs
    if _standin_mark(kept) != _recipe():
        say(f"Building a stand-in for {name} from Debian packages.")
        started = time.monotonic()
        folder = BASE_IMAGES.get(name)
        if folder is None:
            _import_debian(kept, name.removeprefix("debian:").removesuffix("-slim"))
        else:
            label = f"{STANDIN_LABEL}={_recipe()}"
            build(STANDINS / folder, "--tag", kept, "--label", label)
        say(f"  {name} is ready after {time.monotonic() - started:.0f} s")
    docker("tag", kept, name)


def build(context: Path, *arguments: str) -> str:
    """Build an image with the legacy builder, which Debian's Engine has, and return the output."""
    legacy = os.environ | {"DOCKER_BUILDKIT": "0"}
    return run("docker", "build", *arguments, str(context), limit=900, env=legacy)


def _import_debian(name: str, suite: str) -> None:
    _install({"debootstrap": "debootstrap"}, lambda _: None)
    with tempfile.TemporaryDirectory(prefix="velikiy-debootstrap-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        # The mirrors that this machine uses have each suite of Debian. Otherwise debootstrap uses its default.
        mirrors = {own.replace("bookworm", suite): uri for own, uri in _debian_sources().items()}
        mirror = [mirrors[suite]] if suite in mirrors else []
        run("debootstrap", "--variant=minbase", suite, folder, *mirror, limit=900)

        if mirror:
            lines = [f"deb {uri} {suite} main\n" for suite, uri in mirrors.items()]
            (root / "etc/apt/sources.list").write_text("".join(lines))
        policy = root / "usr/sbin/policy-rc.d"  # as in the official image: packages start no server
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        # As in the official image: dpkg would wait for the disk after each file, and an image need not survive a power
        # cut.
        (root / "etc/dpkg/dpkg.cfg.d/docker-apt-speedup").write_text("force-unsafe-io\n")
        shutil.rmtree(root / "var/lib/apt/lists")
        (root / "var/lib/apt/lists/partial").mkdir(parents=True)
        for host_file in ("etc/resolv.conf", "etc/hostname"):
            (root / host_file).unlink(missing_ok=True)
        # The host's CA bundle, so that a build can fetch over TLS whatever the host can fetch. The host's own CAs too:
        # the package ca-certificates would otherwise remove them from the bundle.
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
            raise Unavailable("tar could not read the Debian base system.")


def _debian_sources() -> dict[str, str]:
    """Return the mirror of each suite of Debian 12 that this machine uses."""
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
    """Return the command of Compose v2: `docker compose`, or Debian 13's, unpacked into the cache and not installed."""
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
        raise Unavailable("Compose v2 is missing (the Docker package docker-compose-plugin contains it).")
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("lists/partial", "cache/archives/partial", "sources", "download"):
        (folder / part).mkdir(parents=True)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (folder / "sources/trixie.list").write_text(f"deb [signed-by={keys}] {mirror} trixie main\n")
    separate = {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": folder / "sources",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
    }
    options = [part for key, value in separate.items() for part in ("-o", f"{key}={value}")]
    run("apt-get", *options, "update", limit=300)
    run("apt-get", *options, "download", "docker-compose", limit=300, cwd=folder / "download")
    package = next((folder / "download").glob("docker-compose_*.deb"))
    run("dpkg", "--extract", str(package), str(folder / "unpacked"))


def _compose_v1(say: Say) -> list[str]:
    """Return the command of Compose 1.29, as Debian 12 packages it, or nothing if only a newer Compose exists."""
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
    except Unavailable as reason:
        sys.exit(str(reason))
