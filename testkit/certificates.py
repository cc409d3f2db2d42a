"""Certificates for tests: a certificate authority, and server certificates that it has signed."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")


class Authority:
    """A certificate authority with its files in a folder that the services' user can enter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cert = folder / "ca.pem"
        self._key = folder / "ca.key"
        _openssl("req", "-x509", *KEY, "-subj", "/CN=test authority", "-keyout", self._key, "-out", self.cert)

    def sign(self, cert: Path, key: Path, *, days: int = 90, addresses: Sequence[str] = ("127.0.0.1",)) -> None:
        """Write a new certificate for localhost and these addresses, and its key."""
        request, names = self.folder / "request", self.folder / "names"
        names.write_text(",".join(["subjectAltName=DNS:localhost", *(f"IP:{it}" for it in addresses)]) + "\n")
        new_cert, new_key = cert.with_suffix(".new"), key.with_suffix(".new")
        _openssl("req", *KEY, "-subj", "/CN=localhost", "-keyout", new_key, "-out", request)
        _openssl(
            *["x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial"],
            *["-days", str(days), "-extfile", names, "-out", new_cert],
        )
        new_key.chmod(0o644)  # the services run as another user
        new_cert.replace(cert)
        new_key.replace(key)


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=True)
