"""The version, the tags and the release notes agree (docs/releasing.md)."""

import re
import subprocess
import tomllib

from testkit.stack import ROOT
from velikiy import __version__

SECTIONS = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_pyproject_has_the_version_of_the_package() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_changelog_begins_with_the_changes_of_no_release_yet() -> None:
    assert SECTIONS[0] == "Unreleased"


def test_each_release_in_the_changelog_has_a_date_and_is_newer_than_the_next() -> None:
    released = [re.fullmatch(r"(\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d", title) for title in SECTIONS[1:]]
    assert all(released), SECTIONS
    versions = [number(match[1]) for match in released if match]
    assert versions == sorted(versions, reverse=True)
    assert not versions or versions[0] == number(__version__)


def test_tag_of_this_commit_names_its_version() -> None:
    tags = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    versions = [tag for tag in tags.stdout.split() if re.fullmatch(r"v\d.*", tag)]
    assert versions in ([], [f"v{__version__}"])
