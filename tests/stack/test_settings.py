"""Settings: each is typed and documented, and a bad value is refused by name."""

import re
import subprocess
from pathlib import Path

import pytest

from testkit.stack import PERSONAL_SETTINGS, ROOT, clean_environment, folder, free_ports, run
from velikiy.settings import BadSetting, Settings, StackSettings, load

GOOD = {"database_url": "postgresql://a@b/c", "redis_url": "redis://d", "edge_secret": "sixteen-or-more-characters"}


@pytest.fixture(autouse=True)
def without_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PERSONAL_SETTINGS, *(field.upper() for field in Settings.model_fields)):
        monkeypatch.delenv(name, raising=False)


def test_default_ttls_are_5_and_60_seconds() -> None:
    settings = load(Settings, None, **GOOD)
    assert (settings.edge_ttl, settings.redis_ttl) == (5, 60)


def test_environment_wins_over_env_files_and_env_files_over_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "database_url").write_text("postgresql://secret/x\n")
    (tmp_path / "redis_url").write_text("redis://secret\n")
    (tmp_path / "edge_secret").write_text("sixteen-or-more-characters\n")
    (tmp_path / "env").write_text("REDIS_TTL=7\nEDGE_TTL=8\nDATABASE_TIMEOUT=\n")
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("EDGE_TTL", "9")
    settings = load(Settings, tmp_path / "env")
    assert settings.database_url == "postgresql://secret/x"
    assert (settings.redis_ttl, settings.edge_ttl, settings.database_timeout) == (7, 9, 1.0)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("REDIS_TTL", "soon", "a whole number from 1 to 86400"),
        ("REDIS_TTL", "0", "a whole number from 1 to 86400"),
        ("EDGE_TTL", "1.5", "a whole number from 1 to 3600"),
        ("DATABASE_TIMEOUT", "-1", "a number from 0.1 to 60"),
        ("DATABASE_TIMEOUT", "nan", "a number from 0.1 to 60"),
        ("APP_WORKER_CLASS", "sync", "'epoll' or 'gthread'"),
        ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
        *[("PATH_PREFIX", value, "a path such as /api") for value in ("api", "//x", "/a b", "/..", "/a/../b", "a://x")],
        *[
            ("TRUSTED_PROXIES", value, "a list of addresses and networks")
            for value in ("proxy", "10.0.0.0/99", "10.0.0.0/8;", "*", "unix:")
        ],
    ],
)
def test_bad_value_is_refused_with_its_key_and_the_allowed_values(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(key, value)
    with pytest.raises(BadSetting) as refused:
        load(Settings, None, **GOOD)
    assert f"{key}='{value}'" in str(refused.value)
    assert allowed in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("DATABASE_URL", "mysql://u:hunter2@h"), ("REDIS_URL", "http://:hunter2@h"), ("EDGE_SECRET", "hunter2")],
)
def test_bad_secret_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    for name, good in GOOD.items():
        monkeypatch.setenv(name.upper(), good)
    monkeypatch.setenv(key, value)
    with pytest.raises(BadSetting) as refused:
        load(Settings, None)
    assert key in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_path_prefix_and_trusted_proxies_are_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH_PREFIX", "/v1/api/")
    monkeypatch.setenv("TRUSTED_PROXIES", "127.0.0.1, 10.1.2.3/8 ,2001:db8::1")
    settings = load(Settings, None, **GOOD)
    assert settings.path_prefix == "/v1/api"
    assert settings.trusted_proxies == "127.0.0.1/32,10.0.0.0/8,2001:db8::1/128"
    monkeypatch.setenv("PATH_PREFIX", "/")
    assert load(Settings, None, **GOOD).path_prefix == ""


@pytest.mark.parametrize("name", GOOD)
def test_missing_secret_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadSetting, match=f"{name.upper()} is not set"):
        load(Settings, None, **{key: value for key, value in GOOD.items() if key != name})


def test_env_file_that_is_not_utf8_is_refused_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes("DATA=/tmp/Мои данные".encode("cp1251"))
    with pytest.raises(BadSetting, match=rf"{file} is not UTF-8, in line 1\. Save it as UTF-8; ") as refused:
        load(StackSettings, file)
    assert "\n" not in str(refused.value)
    advice = str(refused.value).partition("windows-1251: ")[2]
    subprocess.run(["/bin/sh", "-c", advice], check=True)
    assert load(StackSettings, file).data == Path("/tmp/Мои данные")


def test_bad_setting_stops_the_start_before_the_data_folder_is_created() -> None:
    with folder() as temporary:
        refused = run(
            "up", "--detach", "--data", str(temporary / "data"), "--port", str(free_ports(1)), REDIS_TTL="soon"
        )
        assert refused.returncode == 1
        assert refused.stderr.strip().splitlines()[-1].startswith("./run: REDIS_TTL='soon' is not allowed")
        assert not (temporary / "data").exists()


def test_env_example_documents_exactly_the_settings_that_exist() -> None:
    documented = re.findall(r"^([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    fields = {name.upper() for kind in (Settings, StackSettings) for name in kind.model_fields}
    fields |= set(re.findall(r"\$\{([A-Z_]+)", "".join(file.read_text() for file in ROOT.glob("compose*.yaml"))))
    assert sorted(documented) == sorted(fields)


def test_env_example_shows_the_default_of_each_setting() -> None:
    text = (ROOT / ".env.example").read_text()
    for kind in (Settings, StackSettings):
        for name, field in kind.model_fields.items():
            shown = re.findall(rf"^{name.upper()}=(.*)$", text, re.MULTILINE)
            default = "" if field.is_required() or field.default is None else str(field.default)
            default = default.lower() if isinstance(field.default, bool) else default
            assert shown == [default], name


def test_git_ignores_the_env_file() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert "REDIS_TTL" not in clean_environment()
