"""Remember the options of `./run up`, so that a later `./run up` without them changes nothing.

An option counts until another value is given, until `--defaults` forgets it, and until the setting of the same name (in
`.env` or the environment) changes: the newer of both wins.
"""

from typing import Any

from velikiy.settings import StackSettings
from velikiy.stack.plan import Plan

SETTINGS = ("port", "edges", "apps", "bind")
"""Options with a setting of the same name."""

FLAGS = ("tls_self_signed", "monitoring")

DEFAULT_PORTS = (80, 8080, 443, 8443)
"""The ports of which the launcher chooses one if the user has set none."""

Remembered = dict[str, dict[str, Any]]
"""The value of each option, and the value that the setting of its name had then, by the name of the option."""


def remember(given: dict[str, Any], settings: StackSettings, previous: Plan | None, *, forget: bool) -> Remembered:
    """Return the options that count from now on.

    Args:
        given: The options of this command.
        settings: The settings without options.
        previous: The stack of the command before.
        forget: Whether to forget the options of earlier commands.
    """
    earlier = {} if forget or previous is None else _of(previous, settings)
    kept = {name: option for name, option in earlier.items() if option["instead_of"] == _setting(settings, name)}
    now = {
        name: {"value": value, "instead_of": _setting(settings, name)}
        for name, value in given.items()
        if value is not None
    }
    return {name: option for name, option in {**kept, **now}.items() if option["value"] is not False}


def _of(previous: Plan, settings: StackSettings) -> Remembered:
    if previous.options is not None:
        return previous.options
    # An earlier release has started the stack, and remembered nothing. The stack stays as it is.
    values = {name: getattr(previous, name) for name in SETTINGS}
    if previous.port in DEFAULT_PORTS:
        del values["port"]
    values["monitoring"] = previous.monitoring
    values["tls_self_signed"] = previous.tls_cert == str(previous.own_certificate)
    return {
        name: {"value": value, "instead_of": _setting(settings, name)}
        for name, value in values.items()
        if name in FLAGS or value != getattr(settings, name)
    }


def _setting(settings: StackSettings, name: str) -> Any:
    return getattr(settings, name) if name in settings.model_fields_set else None


def value(options: Remembered, name: str) -> Any:
    """Return the value of the option, or None if it does not count."""
    return options.get(name, {}).get("value")


def spelled(options: Remembered) -> str:
    """Return the options as they are typed."""
    words = (
        f"--{name.replace('_', '-')}" + ("" if name in FLAGS else f" {option['value']}")
        for name, option in options.items()
    )
    return " ".join(words)
