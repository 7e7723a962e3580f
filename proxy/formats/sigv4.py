"""AWS Signature Version 4 of S3 requests, in the Authorization header: text in, headers out.

The format is that of the AWS General Reference ("Create a signed AWS API request"), with S3's
exceptions: the path is encoded once, and the payload's hash travels in ``x-amz-content-sha256``,
where the server checks it, so that a byte damaged on the way is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ALGORITHM = "AWS4-HMAC-SHA256"
EMPTY = hashlib.sha256(b"").hexdigest()
"""The hash of no payload."""


def encode_path(path: str) -> str:
    """``path`` as S3 wants it: everything but unreserved characters and ``/`` as ``%XX``."""
    return quote(path, safe="/-_.~")


def encode_query(pairs: Sequence[tuple[str, str]]) -> str:
    """The query in the order and form in which it is signed; also what is sent."""
    encoded = sorted((quote(key, safe="-_.~"), quote(value, safe="-_.~")) for key, value in pairs)
    return "&".join(f"{key}={value}" for key, value in encoded)


@dataclass
class Signer:
    """Signs with one key for one region.  ``repr`` shows no secret."""

    access_key: str
    secret_key: str = field(repr=False)
    region: str
    service: str = "s3"
    _day: str = ""
    _key: bytes = field(default=b"", repr=False)

    def sign(
        self,
        method: str,
        path: str,
        query: str,
        headers: Mapping[str, str],
        *,
        payload: str,
        now: float,
    ) -> dict[str, str]:
        """The headers to send: ``headers`` (lower-case names, with ``host``) and three more.

        ``path`` and ``query`` are encoded already; ``payload`` is the body's SHA-256 in hex,
        ``now`` the Unix time.
        """
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        signed = {**headers, "x-amz-content-sha256": payload, "x-amz-date": stamp}
        names = sorted(signed)
        canonical = "\n".join(
            (
                method,
                path,
                query,
                *(f"{name}:{' '.join(signed[name].split())}" for name in names),
                "",
                ";".join(names),
                payload,
            )
        )
        scope = f"{stamp[:8]}/{self.region}/{self.service}/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"{_ALGORITHM}\n{stamp}\n{scope}\n{digest}"
        signature = hmac.new(self._key_of(stamp[:8]), text.encode(), "sha256").hexdigest()
        signed["authorization"] = (
            f"{_ALGORITHM} Credential={self.access_key}/{scope}, "
            f"SignedHeaders={';'.join(names)}, Signature={signature}"
        )
        return signed

    def _key_of(self, day: str) -> bytes:
        if self._day != day:
            key = f"AWS4{self.secret_key}".encode()
            for part in (day, self.region, self.service, "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._day, self._key = day, key
        return self._key
