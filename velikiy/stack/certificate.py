"""Check the certificate of the edges, or create one that signs itself."""

import subprocess
from pathlib import Path

from velikiy.settings import ServiceSettings
from velikiy.stack import Refusal
from velikiy.stack.code_copy import code_folder
from velikiy.stack.plan import Plan

SELF_SIGNED_DAYS = 365

RENEW_S = 30 * 24 * 3600
"""`up` replaces a self-signed certificate that expires within this time."""


def of_the_user(settings: ServiceSettings) -> tuple[str, str]:
    """Return the paths of TLS_CERT and TLS_KEY.

    Raises:
        Refusal: The account of the services cannot use the files.
    """
    if not settings.tls_cert or not settings.tls_key:
        given, missing = ("TLS_CERT", "TLS_KEY") if settings.tls_cert else ("TLS_KEY", "TLS_CERT")
        raise Refusal(f"{given} is set and {missing} is not. Set both, or none for plain HTTP.")
    for name, file in (("TLS_CERT", settings.tls_cert), ("TLS_KEY", settings.tls_key)):
        if not file.is_absolute():
            raise Refusal(f"{name}='{file}' is not allowed: it must be an absolute path.")
    paths = str(settings.tls_cert), str(settings.tls_key)
    check = subprocess.run(
        [str(code_folder() / "edge" / "check_certificate"), *paths], capture_output=True, text=True, check=False
    )
    if check.returncode != 0:
        raise Refusal(check.stderr.strip())
    return paths


def self_signed(plan: Plan) -> tuple[str, str]:
    """Return the paths of the stack's own certificate and key. Create them if they are missing, expire soon or name
    another address.

    Raises:
        Refusal: openssl failed.
    """
    cert, key = plan.own_certificate, plan.own_certificate.with_name("key.pem")
    address = "127.0.0.1" if plan.bind in ("0.0.0.0", "::") else plan.bind  # noqa: S104
    names = ",".join(["DNS:localhost", *(f"IP:{ip}" for ip in dict.fromkeys(("127.0.0.1", "::1", address)))])
    noted = cert.with_name("names")
    if not (noted.exists() and noted.read_text() == names and _lasts(cert)):
        cert.parent.mkdir(mode=0o700, exist_ok=True)
        created = subprocess.run(
            [
                *["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"],
                *["-days", str(SELF_SIGNED_DAYS), "-subj", "/CN=localhost", "-addext", f"subjectAltName={names}"],
                *["-addext", "extendedKeyUsage=serverAuth", "-keyout", str(key), "-out", str(cert)],
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if created.returncode != 0:
            raise Refusal(f"openssl could not create a certificate: {created.stderr.strip().splitlines()[-1]}")
        key.chmod(0o600)
        noted.write_text(names)
    return str(cert), str(key)


def _lasts(cert: Path) -> bool:
    command = ["openssl", "x509", "-in", str(cert), "-noout", "-checkend", str(RENEW_S)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fingerprint(cert: Path) -> str:
    """Return the SHA-256 of the certificate as browsers show it."""
    command = ["openssl", "x509", "-in", str(cert), "-noout", "-fingerprint", "-sha256"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().partition("=")[2]
