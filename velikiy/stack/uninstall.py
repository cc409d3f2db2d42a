"""Remove what `./run` has left on this machine, after a question. Only the checkout itself stays."""

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import click

from velikiy.stack import Refusal, code_copy, privileges, service
from velikiy.stack.code_copy import CHECKOUT
from velikiy.stack.messages import command, report, step
from velikiy.stack.plan import Plan

PACKAGES_RECORD = "packages"
"""The file beside the Python environments with each package that `./run` has installed, dependencies included."""

SERVERS = ("nginx", "postgresql", "redis-server", "prometheus")
"""Packages with services of their own."""

APT_NOTES = Path("/var/lib/apt/extended_states")
"""Where apt notes which packages were installed for others only."""


@dataclass
class Leftovers:
    """The things that `./run` has left, by kind."""

    home: Path
    units: list[str] = field(default_factory=list)
    has_data: bool = False
    cached: list[Path] = field(default_factory=list)
    """Folders of `code_copy.kept_in` from which no other stack runs."""

    in_use: list[Path] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    account: str = ""

    @classmethod
    def find(cls, home: Path) -> "Leftovers":
        cache = _cache()
        cached = code_copy.kept_in(cache)
        in_use = [] if not cached else [entry for entry in cached if code_copy.is_in_use(entry.name, not_in=home)]
        found = cls(home, service.installed_units(), Plan.file_in(home).exists(), in_use=in_use)
        found.cached = [entry for entry in cached if entry not in in_use]
        if privileges.is_root():
            found.packages = [] if in_use else _removable_packages()
            with contextlib.suppress(KeyError):
                found.account = pwd.getpwnam(privileges.SERVICE_USER).pw_name
        return found

    def describe(self) -> None:
        rows = [
            ("service", ", ".join(self.units)),
            ("data", f"{self.home} ({_megabytes(self.home)} MB)" if self.has_data else ""),
            ("environments and code", f"{len(self.cached)} folders in {_cache()}" if self.cached else ""),
            ("packages", " ".join(self.packages)),
            ("user", self.account),
        ]
        report("./run has left on this machine:")
        for name, value in rows:
            report(f"  {name:<22} {value or '-'}")
        if self.in_use:
            report(f"  Another stack runs from {_cache()}: what it needs there stays, and so do the packages.")

    def are_any(self) -> bool:
        return bool(self.units or self.has_data or self.cached or self.packages or self.account)


def uninstall(home: Path, *, yes: bool, delete_data: bool) -> None:
    """Show what is left, ask, and remove it.

    Args:
        home: The data folder.
        yes: Do not ask. The data stays unless `delete_data` is set too.
        delete_data: Delete the data as well, which is asked for otherwise.

    Raises:
        Refusal: There is no terminal to ask at.
    """
    found = Leftovers.find(home)
    found.describe()
    if not found.are_any():
        return
    if not yes:
        if not sys.stdin.isatty():
            raise Refusal("There is no terminal to ask at. Add --yes, and --delete-data to delete the data too.")
        delete_data = delete_data or (found.has_data and _agrees_to_delete(home))
        kept = "" if delete_data or not found.has_data else ", and keep the data"
        click.confirm(f"Stop the stack and remove all of this{kept}?", abort=True)
    if found.units:
        service.uninstall()
    if found.has_data:
        wipe = ["--wipe"] if delete_data else []
        subprocess.run([str(CHECKOUT / "run"), "down", "--data", str(home), *wipe], check=True)
    if found.account and not (found.has_data and not delete_data) and not found.in_use:
        subprocess.run(["userdel", found.account], check=False, stderr=subprocess.DEVNULL)
    _remove_cached(found)
    if found.packages:
        with step(f"removing {len(found.packages)} packages"):
            _apt_get("remove", "--yes", *found.packages)
    _say_what_stays(found, delete_data)


def _agrees_to_delete(home: Path) -> bool:
    answer = str(click.prompt(f"Delete the data in {home}, with every row? Type 'delete' or 'keep'", default="keep"))
    return answer.strip().lower() == "delete"


def _remove_cached(found: Leftovers) -> None:
    with step(f"removing {len(found.cached)} environments and copies of the code"):
        for entry in found.cached:
            shutil.rmtree(entry, ignore_errors=True)
        if not found.in_use:
            for name in (PACKAGES_RECORD, "lock"):
                (_cache() / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder contains other files
                _cache().rmdir()


def _say_what_stays(found: Leftovers, delete_data: bool) -> None:
    if found.has_data and not delete_data:
        owner = f", and so does the user {found.account}, who owns it" if found.account else ""
        report(f"The data in {found.home} stays{owner}. To start a stack with it: {command('up', home=found.home)}")
    if service.BACKUPS.is_dir():
        report(f"The backups stay: {service.BACKUPS}")
    if found.packages:
        report("Debian keeps the configuration files of removed packages in /etc; apt-get purge removes them.")
    report(f"The checkout stays: {CHECKOUT}")


def _removable_packages() -> list[str]:
    """Return the packages that `./run` installed, that are still there, and that no other package needs.

    apt decides: as if these packages were installed for others only, it lists what nothing needs.
    """
    record = _cache() / PACKAGES_RECORD
    if not record.exists():
        return []
    installed = _dpkg_installed()
    ours = sorted(set(record.read_text().split()) & installed - _used_by_their_services())
    if not ours:
        return []
    with tempfile.TemporaryDirectory() as folder:  # a copy of apt's notes: the answer to the question may be no
        notes = Path(folder) / "extended_states"
        shutil.copy(APT_NOTES, notes)
        option = ["-o", f"Dir::State::extended_states={notes}"]
        subprocess.run(["apt-mark", *option, "auto", *ours], capture_output=True, check=True)
        listed = subprocess.run(
            ["apt-get", *option, "--simulate", "autoremove"], capture_output=True, text=True, check=True
        ).stdout
    unneeded = {line.split()[1] for line in listed.splitlines() if line.startswith("Remv ")}
    return [name for name in ours if name in unneeded]


def _used_by_their_services() -> set[str]:
    """Return the packages of servers whose own services are on: `./run` has switched these off, and an operator on."""
    if not shutil.which("systemctl"):
        return set()
    return {server for server in SERVERS if service.is_enabled(server)}


def _dpkg_installed() -> set[str]:
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package}\n"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[1] for line in lines if line.startswith("installed ")}


def _apt_get(*arguments: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(["apt-get", *arguments], capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise Refusal(f"apt-get {' '.join(arguments)} failed: {done.stderr.strip()}")


def _cache() -> Path:
    return Path(os.environ["VELIKIY_CACHE"])


def _megabytes(folder: Path) -> int:
    """Return the size of the folder. Files that vanish meanwhile count as nothing."""
    done = subprocess.run(["du", "-sm", str(folder)], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0]) if done.stdout else 0
