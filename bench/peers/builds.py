"""Build the peers that are not written in Python: once for each version of their sources, in the cache of `./run`."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from testkit.stack import clean_environment

HERE = Path(__file__).parent

GO_PATH = Path("/usr/share/gocode")
"""The folder of Debian's packages with libraries for Go."""

GO_LIBRARIES = ("github.com/jackc/pgx/v4/pgxpool", "github.com/gomodule/redigo/redis")

BUILD_TIMEOUT_S = 180


class NotBuilt(Exception):
    """The peer cannot be built on this machine. The message is the reason in a few words."""


def fastify() -> Path:
    """Install Fastify and its libraries. Return the folder with server.js."""
    for program in ("node", "npm"):
        if not shutil.which(program):
            raise NotBuilt(f"no {program}")
    # npm would write a lock file with the addresses of a registry, and keep its downloads in the home of the user.
    install = ["npm", "install", "--no-package-lock", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"]
    return _build("fastify", [*install, "--fetch-retries=0", "--cache", "cache"])


def go() -> Path:
    """Compile the service in Go with the libraries of Debian's packages. Return the program."""
    if not shutil.which("go"):
        raise NotBuilt("no golang")
    for library in GO_LIBRARIES:
        if not (GO_PATH / "src" / library).is_dir():
            raise NotBuilt(f"no {library}")
    # Without modules, Go reads its libraries from GOPATH and downloads nothing.
    settings = {"GO111MODULE": "off", "GOPATH": str(GO_PATH), "GOFLAGS": "", "GOPROXY": "off", "CGO_ENABLED": "0"}
    return _build("go", ["go", "build", "-o", "service", "main.go"], **settings) / "service"


def _build(name: str, command: list[str], **settings: str) -> Path:
    """Return the folder with the sources and the results of the command, which runs there unless it did before."""
    cache = Path(os.environ["VELIKIY_CACHE"])
    built = cache / f"peer-{name}-{_digest(HERE / name, command, settings)}"
    if built.is_dir():
        os.utime(built)  # unused folders are removed (velikiy/stack/code_copy.py)
    else:
        cache.mkdir(parents=True, exist_ok=True)
        making = cache / f"{built.name}-{os.getpid()}.new"
        try:
            shutil.copytree(HERE / name, making)
            environment = clean_environment(**settings, GOCACHE=str(making / "cache"))
            _run(name, command, making, environment)
            shutil.rmtree(making / "cache", ignore_errors=True)
            # A new name only at the end: an interrupted build must not leave half a folder.
            making.rename(built)
        except OSError:
            if not built.is_dir():  # else another run has built it meanwhile
                raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return built


def _run(name: str, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotBuilt(f"{command[0]} took too long") from None
    if done.returncode != 0:
        print(f"{name}: {' '.join(command)}\n{done.stderr.strip()}", file=sys.stderr)
        raise NotBuilt(f"{command[0]} failed")


def _digest(sources: Path, command: list[str], settings: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr((command, sorted(settings.items()))).encode())
    version = subprocess.run([command[0], "version"], capture_output=True, check=False)
    digest.update(version.stdout)
    for file in sorted(sources.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
