"""Self-signed certificates, made when a listener with ``autoCert`` has no usable one.

Xen Orchestra does not verify a proxy's certificate; TLS keeps the token from bystanders.
A foreign certificate that is still valid is never replaced.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proxy.config.durable import replace_file
from proxy.errors import Refused, from_os_error

if TYPE_CHECKING:
    from pathlib import Path

LIFE = timedelta(days=360)
RENEW_BEFORE = timedelta(days=30)
_SMALLEST_RSA = 2048
_SMALLEST_EC = 224

_log = structlog.get_logger("proxy.certificates")


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason`` why a pair cannot be used, ``''`` when it can."""

    reason: str
    foreign_and_valid: bool = False
    """Somebody else signed the certificate and its dates are good: not ours to replace."""
    self_made: bool = False
    left: timedelta = timedelta(0)


def ensure(cert: Path, key: Path, *, hostname: str | None = None) -> bool:
    """Make the pair at ``cert`` and ``key`` unless a usable one is there; true when made.

    A self-made one is renewed when less than 30 days are left.  Blocks.  Raises ``Refused``
    when the files cannot be written, or when a foreign certificate would have to go.
    """
    verdict = examine(cert, key)
    reason = verdict.reason
    if not reason and verdict.self_made and verdict.left < RENEW_BEFORE:
        reason = f"{verdict.left.days} days left"
    if not reason:
        return False
    if verdict.foreign_and_valid:
        raise Refused(
            f"the certificate {cert} is valid but cannot be used ({reason}); put its key at {key},"
            " or move the certificate away to have a self-signed one made"
        )
    _log.info("making a self-signed certificate", cert=str(cert), reason=reason)
    cert_pem, key_pem = self_signed(hostname)
    try:
        # The key first: a certificate with the wrong key is seen and replaced next time.
        replace_file(key, key_pem, 0o400)
        replace_file(cert, cert_pem, 0o400)
    except OSError as error:
        raise from_os_error(error, "writing the certificate", str(cert.parent)) from error
    return True


def examine(cert: Path, key: Path) -> Verdict:
    """Whether TLS can be spoken with these files now.

    An intermediate chain after the first certificate is left to the TLS library.
    """
    try:
        found = x509.load_pem_x509_certificate(cert.read_bytes())
    except FileNotFoundError:
        return Verdict("there is none")
    except (OSError, ValueError):
        return Verdict("it is unreadable")
    now = datetime.now(UTC)
    if now >= found.not_valid_after_utc:
        return Verdict("it expired")
    if now < found.not_valid_before_utc:
        return Verdict("it is not valid yet")
    self_made = found.issuer == found.subject
    return Verdict(
        _key_problem(key, found), not self_made, self_made, found.not_valid_after_utc - now
    )


def _key_problem(key: Path, cert: x509.Certificate) -> str:
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except FileNotFoundError:
        return "its key is missing"
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        return "its key is unreadable or encrypted"
    if private.public_key() != cert.public_key():
        return "its key belongs to another certificate"
    if isinstance(private, rsa.RSAPrivateKey) and private.key_size < _SMALLEST_RSA:
        return f"its RSA key has fewer than {_SMALLEST_RSA} bits"
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.key_size < _SMALLEST_EC:
        return f"its elliptic-curve key has fewer than {_SMALLEST_EC} bits"
    return ""


def self_signed(hostname: str | None = None) -> tuple[bytes, bytes]:
    """A new certificate and its key, PEM.

    EC P-256: a handshake costs a tenth of RSA-2048's on the small appliance, and every TLS
    library that Xen Orchestra or XCP-ng ships speaks it.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    common = hostname or socket.gethostname() or "xo-proxy"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # peers whose clock is behind
        .not_valid_after(now + LIFE)
        .add_extension(x509.SubjectAlternativeName([_alternative(common)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name.encode("idna").decode("ascii"))
    except UnicodeError:
        return x509.DNSName("xo-proxy")
