"""The one certificate that is expected, and those that it signed."""

from __future__ import annotations

import pytest

from proxy.errors import Unreachable
from proxy.runtime.pinning import check_pin
from tests.certificates import Identity, make

OWN = make("host1")
AUTHORITY = make("authority")
SIGNED = make("host2", issuer=AUTHORITY)
EXPIRED = make("host3", days=-2)


@pytest.mark.parametrize(
    ("shown", "pem", "subject"),
    [
        (OWN, OWN.pem, "another name"),
        (EXPIRED, EXPIRED.pem, ""),  # it is the very one: its dates add nothing
        (SIGNED, AUTHORITY.pem, "host2"),
        (SIGNED, AUTHORITY.pem, "ALT.host2"),
        (SIGNED, AUTHORITY.pem, ""),
        (SIGNED, OWN.pem + AUTHORITY.pem, "host2"),
    ],
)
def test_the_right_one(shown: Identity, pem: str, subject: str) -> None:
    check_pin(shown.der, pem, "peer", subject=subject)


@pytest.mark.parametrize(
    ("shown", "pem", "subject"),
    [
        (OWN.der, make("host1").pem, "host1"),  # the name alone is nothing
        (SIGNED.der, AUTHORITY.pem, "host1"),
        (make("old", issuer=AUTHORITY, days=-1).der, AUTHORITY.pem, ""),
        (make("host1", issuer=make("authority")).der, AUTHORITY.pem, "host1"),
        (None, OWN.pem, ""),
        (b"\x30\x00", OWN.pem, ""),
        (OWN.der, "", ""),
        (OWN.der, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", ""),
    ],
)
def test_any_other(shown: bytes | None, pem: str, subject: str) -> None:
    with pytest.raises(Unreachable) as caught:
        check_pin(shown, pem, "peer", subject=subject)
    assert caught.value.code == "CERT_REJECTED"
