from __future__ import annotations

import shutil
import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from proxy import certificates
from proxy.errors import Refused

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class Pair:
    def __init__(self, directory: Path) -> None:
        self.cert = directory / "tls" / "certificate.pem"
        self.key = directory / "tls" / "key.pem"

    def ensure(self) -> bool:
        return certificates.ensure(self.cert, self.key, hostname="proxy.example")

    def put(
        self,
        *,
        foreign: bool = False,
        start: datetime = NOW - DAY,
        end: datetime = NOW + 100 * DAY,
        key: Key | None = None,
    ) -> None:
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "proxy")])
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the authority")])
        cert = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer if foreign else subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(start)
            .not_valid_after(end)
            .sign(key, hashes.SHA256())
        )
        self.cert.parent.mkdir(exist_ok=True)
        self.cert.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        self.put_key(key)

    def put_key(self, key: Key) -> None:
        self.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_a_missing_pair_is_made(pair: Pair) -> None:
    """Upstream makes the directory with the file's own mode, 0400, and cannot enter it."""
    assert pair.ensure()
    assert stat.S_IMODE(pair.cert.parent.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in (pair.cert, pair.key)] == [0o400] * 2
    assert sorted(path.name for path in pair.cert.parent.iterdir()) == [
        "certificate.pem",
        "key.pem",
    ]
    assert certificates.examine(pair.cert, pair.key).reason == ""
    assert not pair.ensure()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_accepts_what_was_made(pair: Pair) -> None:
    pair.ensure()
    verify = ["openssl", "verify", "-CAfile", str(pair.cert), "-verify_hostname", "proxy.example"]
    shown = subprocess.run([*verify, str(pair.cert)], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr


def test_a_client_that_trusts_it_connects(pair: Pair) -> None:
    pair.ensure()
    server_in, server_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    offered = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    offered.load_cert_chain(pair.cert, pair.key)
    server = offered.wrap_bio(server_in, server_out, server_side=True)
    context = ssl.create_default_context(cafile=str(pair.cert))
    client_in, client_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(client_in, client_out, server_hostname="proxy.example")
    done: set[ssl.SSLObject] = set()
    while len(done) < 2:
        for side in (client, server):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
            server_in.write(client_out.read())
            client_in.write(server_out.read())
    assert client.version() == "TLSv1.3"


@pytest.mark.parametrize("foreign", [True, False])
def test_a_valid_pair_is_kept(pair: Pair, foreign: bool) -> None:
    pair.put(foreign=foreign)
    before = pair.cert.read_bytes()
    assert not pair.ensure()
    assert pair.cert.read_bytes() == before


@pytest.mark.parametrize("foreign", [True, False])
def test_an_expired_one_is_replaced(pair: Pair, foreign: bool) -> None:
    pair.put(foreign=foreign, start=NOW - 10 * DAY, end=NOW - DAY)
    assert pair.ensure()


def test_one_from_the_future_is_replaced(pair: Pair) -> None:
    pair.put(start=NOW + DAY)
    assert pair.ensure()


def test_a_self_made_one_is_renewed_a_month_ahead(pair: Pair) -> None:
    pair.put(end=NOW + 29 * DAY)
    assert pair.ensure()
    pair.cert.unlink()
    pair.key.unlink()
    pair.put(end=NOW + 29 * DAY, foreign=True)
    assert not pair.ensure()


def test_a_small_key_is_replaced(pair: Pair) -> None:
    pair.put(key=rsa.generate_private_key(65537, 1024))
    assert pair.ensure()


def test_a_key_of_another_certificate_is_replaced(pair: Pair) -> None:
    pair.put()
    pair.put_key(ec.generate_private_key(ec.SECP256R1()))
    assert pair.ensure()


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\n"])
def test_garbage_is_replaced(pair: Pair, content: bytes) -> None:
    pair.cert.parent.mkdir()
    pair.cert.write_bytes(content)
    assert pair.ensure()


@pytest.mark.parametrize("damage", ["missing", "garbage", "of another"])
def test_a_valid_foreign_certificate_is_never_overwritten(pair: Pair, damage: str) -> None:
    pair.put(foreign=True)
    before = pair.cert.read_bytes()
    if damage == "missing":
        pair.key.unlink()
    elif damage == "garbage":
        pair.key.write_bytes(b"garbage")
    else:
        pair.put_key(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(Refused, match="is valid but cannot be used"):
        pair.ensure()
    assert pair.cert.read_bytes() == before


def test_a_place_that_cannot_be_written_is_an_error(pair: Pair) -> None:
    pair.cert.parent.write_bytes(b"a file where the directory should be")
    with pytest.raises(Exception, match="writing the certificate"):
        pair.ensure()
