"""Where an S3 remote is: endpoint, bucket, prefix and region out of its URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy.errors import Refused
from proxy.remotes import paths

if TYPE_CHECKING:
    from proxy.remotes.url import S3Url

DEFAULT_REGION = "us-east-1"
_AMAZON = re.compile(
    r"s3(?:-fips)?(?:\.dualstack)?[.-](?P<region>[a-z]{2}(?:-[a-z]+)+-\d+)\.amazonaws\.com(?:\.cn)?\Z"
)
_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[^\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>\d{1,5}))?\Z")


@dataclass(frozen=True, slots=True)
class S3Endpoint:
    """``prefix`` has no slash at either end; ``""`` is the whole bucket."""

    host: str
    port: int
    tls: bool
    bucket: str
    prefix: str
    region: str

    @classmethod
    def of(cls, url: S3Url) -> S3Endpoint:
        """Raises ``Refused`` (``EINVAL``) with ``data.part``.

        The region is the URL's fragment, else what an Amazon host name says, else us-east-1.
        Upstream guesses from ``s3.<region>.amazonaws.com`` alone.
        """
        bucket, _, prefix = url.path.lstrip("/").partition("/")
        if not bucket:
            raise _wrong("bucket", "is missing: the path must be /<bucket>/<directory>")
        if not url.username or not url.password:
            raise _wrong("username", "and password must be the access key and its secret")
        match = _AUTHORITY.match(url.host)
        tls = url.protocol == "https"
        port = int(match["port"] or (443 if tls else 80)) if match else 0
        if match is None or not 0 < port < 65536:
            raise _wrong("host", "must be a name or address, with :port if it is not the usual one")
        host = match["ipv6"] or match["host"]
        guess = _AMAZON.match(host)
        region = url.region or (guess["region"] if guess else DEFAULT_REGION)
        return cls(host, port, tls, bucket, paths.normalise(prefix), region)


def _wrong(part: str, what: str) -> Refused:
    return Refused(f"remote URL: {part} {what}", code="EINVAL", data={"part": part})
