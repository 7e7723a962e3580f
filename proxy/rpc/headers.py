"""Headers that every answer carries, whoever makes it.

The server adds them as bytes: to pass a dozen constant headers through three layers that
each validate them would cost as much as the rest of a small answer.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}

SECURITY: dict[str, str] = {
    "content-security-policy": (
        "default-src 'self';base-uri 'self';block-all-mixed-content;font-src 'self' https: data:;"
        "frame-ancestors 'self';img-src 'self' data:;object-src 'none';script-src 'self';"
        "script-src-attr 'none';style-src 'self' https: 'unsafe-inline';upgrade-insecure-requests"
    ),
    "x-dns-prefetch-control": "off",
    "expect-ct": "max-age=0",
    "x-frame-options": "SAMEORIGIN",
    "strict-transport-security": "max-age=15552000; includeSubDomains",
    "x-download-options": "noopen",
    "x-content-type-options": "nosniff",
    "x-permitted-cross-domain-policies": "none",
    "referrer-policy": "no-referrer",
    "x-xss-protection": "0",
}
"""What upstream sends (helmet 4's defaults)."""

_SECURITY_LINES = "".join(f"{name}: {value}\r\n" for name, value in SECURITY.items()).encode()
_dated: tuple[int, bytes] = (0, b"")


def with_fixed_headers(head: bytes) -> bytes:
    """An encoded response head (up to its empty line) with the fixed headers and the date."""
    global _dated  # noqa: PLW0603  one clock for the process
    now = int(time.time())
    if _dated[0] != now:
        date = formatdate(now, usegmt=True).encode()
        _dated = (now, b"%sdate: %s\r\n\r\n" % (_SECURITY_LINES, date))
    return head[:-2] + _dated[1] if head else head
