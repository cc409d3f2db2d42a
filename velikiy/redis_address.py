"""The forms of REDIS_URL: one Redis, several hosts of which one is in use, nodes of a cluster, or Sentinels."""

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

FORM = re.compile(
    r"(?P<scheme>rediss?)(?P<sentinel>\+sentinel)?://(?:(?P<login>[^/?#]*)@)?(?P<hosts>[^/?#@]*)"
    r"(?:/(?P<path>[^?#]*))?(?:\?(?P<options>[^#]*))?"
)
SENTINEL_PORT = 26379


class RedisAddress(NamedTuple):
    urls: tuple[str, ...]
    """One address in the form of redis-py for each host that is named: servers, or Sentinels."""

    primary: str = ""
    """The name by which the Sentinels know the server in use; empty without Sentinels."""

    template: tuple[str, str] = ("", "")
    """The text before and after the host and the port of a server."""

    @property
    def is_fixed(self) -> bool:
        """True if the address names one server. It is used under this address whatever name it has elsewhere, unless it
        is a node of a cluster."""
        return len(self.urls) == 1 and not self.primary

    def of(self, place: str) -> str:
        """Return the address of a server that was found at this place: with the same user, password and options."""
        return place.join(self.template)

    @classmethod
    def parse(cls, text: str) -> "RedisAddress":
        """Raises: ValueError"""
        found = FORM.fullmatch(text)
        if not found:  # a Unix socket, or nothing that redis-py accepts either
            return cls((text,))
        scheme, login, options = found["scheme"] + "://", found["login"], found["options"]
        login = f"{login}@" if login else ""
        hosts = found["hosts"].split(",")
        if len(hosts) > 1 and not all(hosts):
            raise ValueError("a host is missing")
        if not found["sentinel"]:
            end = (f"/{found['path']}" if found["path"] is not None else "") + (f"?{options}" if options else "")
            template = (scheme + login, end)
            return cls(tuple(host.join(template) for host in hosts) if len(hosts) > 1 else (text,), "", template)
        primary, _, number = (found["path"] or "").partition("/")
        if not primary:
            raise ValueError("the name of the primary is missing")
        given = dict(parse_qsl(options or "", keep_blank_values=True, strict_parsing=bool(options)))
        user, password = given.pop("sentinel_username", ""), given.pop("sentinel_password", "")
        sentinel_login = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""
        query = f"?{urlencode(given)}" if given else ""
        urls = (f"{scheme}{sentinel_login}{_with_port(host)}{query}" for host in hosts)
        return cls(tuple(urls), primary, (scheme + login, f"/{number}{query}"))


def _with_port(host: str) -> str:
    return host if re.search(r":\d+$", host) else f"{host}:{SENTINEL_PORT}"
