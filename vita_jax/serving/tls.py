"""A certificate for a server that has none: browsers give the microphone to pages of https and of localhost only."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vita_jax.errors import UserError

CERTIFICATE, KEY = "certificate.pem", "key.pem"
VALID = datetime.timedelta(days=365)
RENEW = datetime.timedelta(days=7)  # before its end a new one is made


def machine_names(host: str) -> list[str]:
    """What this machine may be called: localhost, its name, the address it listens on, the one it reaches others by."""
    names = ["localhost", "127.0.0.1", "::1", socket.gethostname()]
    if host not in ("0.0.0.0", "::"):
        names.append(host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent; it says which address would be used
            names.append(probe.getsockname()[0])
        except OSError:
            pass
    return list(dict.fromkeys(names))


def own_certificate(folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
    """A self-signed certificate and its key, made where there is none that is valid for these names.

    Args:
      folder: where they are kept, so that a browser's exception lasts.
      names: host names and addresses.

    Returns:
      Paths of certificate and key; the key can be read by its owner only.

    Raises:
      UserError: they cannot be written.
    """
    certificate, key = folder / CERTIFICATE, folder / KEY
    if not (key.is_file() and _serves(certificate, names)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _make(certificate, key, names)
        except OSError as error:
            raise UserError(f"{folder}: a certificate cannot be written: {error.strerror}") from error
    return certificate, key


def _serves(path: Path, names: Sequence[str]) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        has = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left > RENEW and set(_alternatives(names)) <= set(has)


def _make(certificate: Path, key: Path, names: Sequence[str]) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vita_jax")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName(_alternatives(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key.unlink(missing_ok=True)
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))


def _alternatives(names: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for name in names:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            if name.isascii():
                found.append(x509.DNSName(name))
    return found
