"""Signatures of Azure Blob Storage: SharedKey for requests, a shared access signature to read.

No I/O and no clock: what is signed is given.  The rules are Microsoft's "Authorize with Shared
Key" and "Create a service SAS"; the tests sign the same with Microsoft's own client.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from proxy.errors import Refused

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping

_SIGNED: Final = (
    "content-encoding",
    "content-language",
    "content-length",
    "content-md5",
    "content-type",
    "date",
    "if-modified-since",
    "if-match",
    "if-none-match",
    "if-unmodified-since",
    "range",
)
"""The standard headers of the text that is signed, in its order."""


@dataclass(frozen=True, slots=True)
class Account:
    name: str
    key: bytes = field(repr=False)

    @classmethod
    def of(cls, name: str, key: str) -> Account:
        """From a URL's user and password; ``Refused`` (``EINVAL``) when they cannot be ones.

        A key that is cut or mistyped would otherwise only show as a wrong signature.
        """
        if not name:
            raise Refused(
                "the URL of the remote names no storage account",
                code="EINVAL",
                data={"part": "username"},
            )
        try:
            decoded = base64.b64decode(key, validate=True)
        except (binascii.Error, ValueError):
            decoded = b""
        if not decoded:
            raise Refused(
                "the key of the storage account is not base64: it is missing or was cut",
                code="EINVAL",
                data={"part": "password"},
            )
        return cls(name, decoded)

    def sign(self, text: str) -> str:
        digest = hmac.new(self.key, text.encode(), hashlib.sha256).digest()
        return base64.b64encode(digest).decode()


def quoted(key: str) -> str:
    """A blob's name as it stands in a URL's path."""
    return quote(key, safe="/~")


def query_string(query: Mapping[str, str]) -> str:
    """``?a=b…`` or nothing.  A space is ``%20``: the service would sign ``+`` as a plus."""
    if not query:
        return ""
    return "?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())


def authorization(
    account: Account,
    method: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
) -> str:
    """The value of ``Authorization`` for a request.

    ``path`` as it is sent (percent-encoded; with azurite it begins with the account), ``query``
    decoded, ``headers`` under any case; ``x-ms-date`` must be one of them.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    if lower.get("content-length") == "0":
        lower["content-length"] = ""  # since version 2015-02-21
    # the service orders them without regard to hyphens
    own = sorted(
        (name for name in lower if name.startswith("x-ms-")),
        key=lambda name: (name.replace("-", ""), name),
    )
    lines = [
        method,
        *(lower.get(name, "") for name in _SIGNED),
        *(f"{name}:{lower[name]}" for name in own),
        f"/{account.name}{path}",
        *(f"{name.lower()}:{value}" for name, value in sorted(query.items())),
    ]
    return f"SharedKey {account.name}:{account.sign(chr(10).join(lines))}"


def read_signature(
    account: Account, container: str, key: str, *, until: datetime.datetime, version: str
) -> dict[str, str]:
    """The query that lets its bearer read this one blob until then: a secret.

    The service reads the source of a Put Block From URL as a stranger would, also within one
    account.
    """
    expiry = until.strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = [
        "r",
        "",  # no start: a clock that is ahead must not put it into the future
        expiry,
        f"/blob/{account.name}/{container}/{key}",
        *("", "", ""),  # stored policy, addresses, protocol
        version,
        "b",  # the resource is a blob
        *("", ""),  # snapshot, encryption scope
        *("", "", "", "", ""),  # headers that the answer should carry
    ]
    return {
        "sv": version,
        "se": expiry,
        "sr": "b",
        "sp": "r",
        "sig": account.sign("\n".join(lines)),
    }
