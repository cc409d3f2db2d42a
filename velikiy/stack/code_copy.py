"""Copy the code to a folder that every user may read, and remove the copies that no stack uses.

The services run from a copy, so that an edit or a `git pull` in the checkout cannot meet a worker that is just
restarting. With --reload they run from the checkout itself.
"""

import compileall
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from velikiy.stack import Refusal

CHECKOUT = Path(__file__).parent.parent.parent

COPIED_FOLDERS = ("velikiy", "migrations", "edge", "deploy")
"""The folders of the checkout that the services need."""

UNUSED_AFTER_S = 30 * 24 * 3600
"""A copy or a Python environment that no command has used for so long is removed."""


def code_folder() -> Path:
    """Return the folder that the services run from, which `privileges.reexec_unprivileged` has chosen."""
    return Path(os.environ["VELIKIY_CODE"])


def make() -> Path:
    """Return a copy of the checkout's code, beside the Python environments.

    The name of the copy is a digest of its content, so stacks with the same code share one copy.

    Raises:
        Refusal: The code contains a mistake.
        OSError: The disk is full, for example.
    """
    copy = Path(os.environ["VELIKIY_CACHE"]) / f"code-{_digest()[:16]}"
    if copy.exists():
        with contextlib.suppress(OSError):
            os.utime(copy)  # marks it as used, for _remove_unused
        return copy
    new = copy.with_name(f"{copy.name}.{os.getpid()}")
    try:
        for name in COPIED_FOLDERS:
            shutil.copytree(CHECKOUT / name, new / name, ignore=shutil.ignore_patterns("__pycache__"))
        for entry in (new, *new.rglob("*")):  # the umask of the clone may have closed files to other users
            entry.chmod(0o755 if entry.is_dir() or entry.stat().st_mode & 0o100 else 0o644)
        # Compile now: root's services cannot write here, and each process would compile for itself at each start.
        if not compileall.compile_dir(new, stripdir=new, prependdir=copy, quiet=2):
            _refuse_mistakes(new)
        # The name of the copy promises its content, so a power failure must not leave files empty under it.
        subprocess.run(["sync", "--file-system", str(new)], check=False)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # half a copy on a full disk would keep it full
        raise
    try:
        new.rename(copy)
    except OSError:  # another launcher was faster
        shutil.rmtree(new)
    _remove_unused(copy.parent)
    return copy


def _refuse_mistakes(copy: Path) -> None:
    """
    Raises:
        Refusal: A file cannot be compiled.
    """
    for file in sorted(copy.rglob("*.py")):
        try:
            compile(file.read_bytes(), file, "exec")
        except (SyntaxError, ValueError) as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            place = f"{CHECKOUT / file.relative_to(copy)}{line}"
            raise Refusal(f"The code cannot run: {error.args[0]} in {place}. Nothing was changed.") from None


def _digest() -> str:
    digest = hashlib.sha256(str(sys.implementation.cache_tag).encode())  # the copy contains compiled files
    for folder in COPIED_FOLDERS:
        for file in sorted((CHECKOUT / folder).rglob("*")):
            if "__pycache__" not in file.parts:
                content = file.read_bytes() if file.is_file() else b""
                digest.update(str(file.relative_to(CHECKOUT)).encode() + b"\0" + content)
    return digest.hexdigest()


def kept_in(cache: Path) -> list[Path]:
    """Return the copies of the code, the Python environments, and peers of the benchmark (bench/peers/builds.py)."""
    return [entry for pattern in ("code-*", "venv-*", "peer-*") for entry in cache.glob(pattern)]


def _remove_unused(cache: Path) -> None:
    """Remove copies of the code, Python environments and peers of the benchmark that former versions left.

    An entry stays while a process runs from it: supervisor restarts a service from the same folder.
    """
    for entry in kept_in(cache):
        with contextlib.suppress(OSError):  # another launcher removes the same entry
            if entry.stat().st_mtime < time.time() - UNUSED_AFTER_S and not is_in_use(entry.name):
                # Rename first: an interrupted removal must not leave half a folder under the name of a whole one.
                removed = entry.with_suffix(".gone")
                entry.rename(removed)
                shutil.rmtree(removed, ignore_errors=True)


def is_in_use(name: str, *, not_in: Path | None = None) -> bool:
    """Return whether another process has this name in its command line. The name ends in a digest, so the last part of
    the path is enough; several paths may lead to the same folder.

    Args:
        name: The name of a copy or a Python environment.
        not_in: Leave out the processes of the stack in this data folder.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            command = (process / "cmdline").read_bytes()
            if int(process.name) == os.getpid() or os.fsencode(name) not in command:
                continue
            if not_in is None or not _belongs_to(process, not_in):
                return True
    return False


def _belongs_to(process: Path, home: Path) -> bool:
    """Return whether the process is a program of the stack in this data folder, or its launcher, which works in /."""
    current = (process / "cwd").readlink()
    is_launcher = os.fsencode(f"VELIKIY_HOME={home}\0") in (process / "environ").read_bytes()
    return current == home or home in current.parents or is_launcher
