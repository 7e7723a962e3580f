"""What Azure Blob Storage's refusals mean, in our errors.

The service says it twice: a status and a code (``x-ms-error-code``, or ``Code`` in the body).
Both stand in the error's ``data`` with the id of the request, which Microsoft's support asks for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from proxy.errors import Conflict, NotFound, ProxyError, Refused, Unauthorized, Unreachable
from proxy.formats.azure_xml import http_date, load_error
from proxy.runtime.secrets import scrub_text

if TYPE_CHECKING:
    from collections.abc import Mapping

_SKEW: Final = 15 * 60
"""Seconds that the service lets a request's date differ from its own."""
_LONGEST_MESSAGE: Final = 512
_SIGNATURE: Final = re.compile(r"sig=[^&\s]+")

_CODES: Final[Mapping[str, tuple[type[ProxyError], str, str]]] = {
    "BlobNotFound": (NotFound, "ENOENT", "the blob does not exist"),
    "ResourceNotFound": (NotFound, "ENOENT", "the blob does not exist"),
    "ContainerNotFound": (NotFound, "ENOBUCKET", "the container does not exist"),
    "ContainerBeingDeleted": (
        Unreachable,
        "EAGAIN",
        "the container is being deleted: its name is free again in a while",
    ),
    "ContainerDisabled": (Refused, "EPERM", "the container is disabled"),
    "BlobAlreadyExists": (Conflict, "EEXIST", "the blob exists already"),
    "ConditionNotMet": (Conflict, "EEXIST", "the blob is not the one that was expected"),
    "TargetConditionNotMet": (Conflict, "EEXIST", "the blob is not the one that was expected"),
    "SourceConditionNotMet": (Conflict, "ESTALE", "the source of the copy has changed"),
    "InvalidBlockList": (
        Conflict,
        "ESTALE",
        "parts of the upload are gone: somebody else wrote the blob, or a week went by",
    ),
    "BlobImmutableDueToPolicy": (
        Refused,
        "EPERM",
        "an immutability policy of the container protects the blob",
    ),
    "BlobImmutableDueToLegalHold": (Refused, "EPERM", "a legal hold protects the blob"),
    "SnapshotsPresent": (
        Refused,
        "EPERM",
        "somebody made snapshots of the blob, which would be lost with it: remove them first",
    ),
    "LeaseIdMissing": (Refused, "EPERM", "another program holds a lease on it"),
    "BlobArchived": (
        Refused,
        "EPERM",
        "the blob is in the archive tier: rehydrate it first",
    ),
    "BlobBeingRehydrated": (Unreachable, "EAGAIN", "the blob is still being rehydrated"),
    "PendingCopyOperation": (Unreachable, "EAGAIN", "a copy onto the blob is still under way"),
    "ServerBusy": (Unreachable, "EAGAIN", "the service is busy and asks for fewer requests"),
    "OperationTimedOut": (Unreachable, "ETIMEDOUT", "the service did not end the request in time"),
    "InternalError": (Unreachable, "EIO", "the service failed"),
    # damaged on the way, or the connection ended: the same bytes may arrive the next time
    "Md5Mismatch": (Unreachable, "EIO", "the data arrived damaged"),
    "Crc64Mismatch": (Unreachable, "EIO", "the data arrived damaged"),
    "IncompleteBody": (Unreachable, "ECONNRESET", "the data did not arrive whole"),
    "AccountIsDisabled": (Unauthorized, "EACCES", "the storage account is disabled"),
    "AuthenticationFailed": (
        Unauthorized,
        "EACCES",
        "the storage account does not accept the key: check it, and that it was not rotated",
    ),
    "KeyBasedAuthenticationNotPermitted": (
        Unauthorized,
        "EACCES",
        "the storage account does not permit access with its key: allow it there",
    ),
    "AuthorizationFailure": (
        Unauthorized,
        "EACCES",
        "the storage account refuses: check the key, and its firewall and network rules",
    ),
}

_STATUSES: Final[Mapping[int, tuple[type[ProxyError], str]]] = {
    401: (Unauthorized, "EACCES"),
    403: (Unauthorized, "EACCES"),
    404: (NotFound, "ENOENT"),
    408: (Unreachable, "ETIMEDOUT"),
    412: (Conflict, "EEXIST"),
    429: (Unreachable, "EAGAIN"),
    501: (Refused, "ENOTSUP"),
    503: (Unreachable, "EAGAIN"),
    504: (Unreachable, "ETIMEDOUT"),
}


def store_error(
    status: int, headers: Mapping[str, str], body: bytes, doing: str, path: str, *, now: float
) -> ProxyError:
    """The error of an answer to a request that was ``doing`` something to ``path``.

    ``now`` is our clock, in seconds since the epoch: a wrong one looks like a wrong key.
    """
    fields = load_error(body) if body else {}
    name = headers.get("x-ms-error-code") or fields.get("Code", "")
    data: dict[str, Any] = {"path": path, "status": status, "azureCode": name}
    if request := headers.get("x-ms-request-id"):
        data["requestId"] = request[:64]
    if (wait := headers.get("retry-after", "")).isdecimal() and len(wait) < 6:
        data["retryAfter"] = int(wait)
    kind, code, meaning = _CODES.get(name) or _by_status(status, fields)
    if kind is Unauthorized and (skew := _skew(headers, now)):
        code, meaning = "EACCES", f"the clock of this appliance is {skew}: set it"
        data["part"] = "clock"
    told = f" ({status} {name})" if name else f" ({status})"
    return kind(f"{code}: {meaning}{told}, {doing} '{path}'", code=code, data=data)


def unclear(what: str, doing: str, path: str) -> Unreachable:
    """An answer that is none of this protocol: a gateway's on the way, or cut."""
    return Unreachable(f"EPROTO: {what}, {doing} '{path}'", code="EPROTO", data={"path": path})


def _by_status(status: int, fields: Mapping[str, str]) -> tuple[type[ProxyError], str, str]:
    """For the codes that have no meaning of their own here."""
    # its first line: what follows are ids and times
    message = scrub_text((fields.get("Message", "").splitlines() or [""])[0][:_LONGEST_MESSAGE])
    meaning = _SIGNATURE.sub("sig=***", message).rstrip(".") or "the service refused"
    if 300 <= status < 400:
        meaning = "it answers with a redirection: the host is no blob service"
    usual = (Unreachable, "EIO") if status >= 500 else (Refused, "EINVAL")
    kind, code = _STATUSES.get(status, usual)
    return kind, code, meaning


def _skew(headers: Mapping[str, str], now: float) -> str:
    """How wrong our clock is, when that explains a refusal; else empty."""
    try:
        ahead = now - http_date(headers.get("date", ""))
    except (ValueError, TypeError, OverflowError):
        return ""
    if abs(ahead) < _SKEW:
        return ""
    side = "ahead of" if ahead > 0 else "behind"
    return f"{abs(ahead) / 60:.0f} minutes {side} that of the store"
