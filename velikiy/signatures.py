"""Sign the requests between apps, writers and edges, and the responses to them (edge/lua/signature.lua).

A request carries `Signature: <nonce> <MAC>`, and the response `Signature: <MAC>`. The MAC of a response contains the
MAC of its request, so a response counts for one request only. Both are HMAC-SHA256 with EDGE_SECRET, which apps, the
relay and edges of one database share: a local user or a neighbouring container that listens on the port of a crashed
server can neither acknowledge a drop nor grant a cache lease.

A nonce is never used twice. It is not compared with earlier nonces, and no clock is compared: a repeated request is a
request that arrives late, which the protocol survives (docs/decisions/0095-sign-the-inside.md).
"""

import hmac
import re
import secrets

HEADER = "Signature"

SIGNED = re.compile("([0-9a-f.]{8,64}) ([0-9a-f]{64})")


class Signer:
    def __init__(self, secret: str) -> None:
        self._key = secret.encode()

    def sign_request(self, method: str, target: str, *, edge: str = "", body: str = "") -> tuple[str, str]:
        """Return the value of the header of a request, and the MAC that belongs to its response.

        `edge`: the instance id in the header X-Edge.
        """
        nonce = secrets.token_hex(16)
        mac = self._of_request(nonce, method, target, edge, body)
        return f"{nonce} {mac}", mac

    def request_mac(self, header: str, method: str, target: str, *, edge: str = "", body: str = "") -> str | None:
        """Return the MAC of a request that arrives with this header, or None if the header was not made with the
        secret."""
        signed = SIGNED.fullmatch(header)
        if signed is None:
            return None
        mac = self._of_request(signed[1], method, target, edge, body)
        return mac if hmac.compare_digest(mac, signed[2]) else None

    def response_mac(self, request_mac: str, status: int, body: str = "") -> str:
        return self._mac(f"response\n{request_mac}\n{status}\n{body}")

    def _of_request(self, nonce: str, method: str, target: str, edge: str, body: str) -> str:
        return self._mac(f"request\n{nonce}\n{method}\n{target}\n{edge}\n{body}")

    def _mac(self, text: str) -> str:
        return hmac.digest(self._key, text.encode(), "sha256").hex()
