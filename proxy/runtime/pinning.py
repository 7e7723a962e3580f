"""Is this the peer whose certificate we were given beforehand?

A host's certificate is self-signed as a rule, often with names and dates that a client would
not accept by itself; but XAPI tells which certificate each host has.  So the handshake takes
any, and what came is compared here.
"""

from __future__ import annotations

import datetime
import functools
import ssl

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from proxy.errors import Unreachable


@functools.cache
def pinned_context() -> ssl.SSLContext:
    """TLS settings that take any certificate: :func:`check_pin` must follow the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Hosts before XCP-ng 8.2 have keys that are refused otherwise; which key it is, is known.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def check_pin(certificate: bytes | None, pem: str, peer: str, *, subject: str = "") -> None:
    """See that ``certificate`` (DER) is one of those in ``pem``, or was signed by one of them.

    One that was only signed by them must be valid today and, where ``subject`` is given,
    carry this name: a certificate authority signs for others too.

    Raises ``Unreachable`` (``CERT_REJECTED``), also when ``pem`` cannot be read.
    """
    try:
        pinned = x509.load_pem_x509_certificates(pem.encode())
        shown = x509.load_der_x509_certificate(certificate or b"")
        trusted = shown in pinned or _is_signed(shown, pinned, subject)
    except (ValueError, TypeError) as error:
        raise _rejected(peer, "it cannot be read") from error
    if not trusted:
        raise _rejected(peer, "it is not the one that the pool tells")


def _rejected(peer: str, reason: str) -> Unreachable:
    return Unreachable(f"the certificate of {peer} is not trusted: {reason}", code="CERT_REJECTED")


def _is_signed(shown: x509.Certificate, pinned: list[x509.Certificate], subject: str) -> bool:
    now = datetime.datetime.now(datetime.UTC)
    if not shown.not_valid_before_utc <= now <= shown.not_valid_after_utc:
        return False
    if subject and subject.lower() not in _names(shown):
        return False
    return any(_issued(shown, issuer) for issuer in pinned)


def _issued(shown: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        shown.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _names(shown: x509.Certificate) -> set[str]:
    names = {str(each.value) for each in shown.subject.get_attributes_for_oid(NameOID.COMMON_NAME)}
    try:
        extension = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names.update(extension.value.get_values_for_type(x509.DNSName))
    except x509.ExtensionNotFound:
        pass
    return {name.lower() for name in names}
