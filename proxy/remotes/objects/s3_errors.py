"""What S3's error answers mean here.

The codes are those of the API reference ("Error responses"); servers that are not Amazon's use
the same ones with other texts, and some answer a status alone.
"""

from __future__ import annotations

import email.utils
import time
from typing import TYPE_CHECKING

from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Refused, Unauthorized, Unreachable
from proxy.formats import s3_xml

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEY = "the access key or its secret is wrong"
_BY_CODE: dict[str, tuple[type[ProxyError], str, str]] = {
    # S3's code: our class, our code, what to tell
    "NoSuchBucket": (NotFound, "ENOBUCKET", "the bucket does not exist"),
    "NoSuchUpload": (NotFound, "ENOUPLOAD", "the upload is gone"),
    "NoSuchKey": (NotFound, "ENOENT", "no such object"),
    "ObjectLockConfigurationNotFoundError": (NotFound, "ENOENT", "the bucket has no object lock"),
    "InvalidBucketName": (Refused, "EINVAL", "the bucket's name is not valid"),
    "InvalidAccessKeyId": (Unauthorized, "EACCES", "the access key is not known there"),
    "SignatureDoesNotMatch": (Unauthorized, "EACCES", _KEY),
    "AccessDenied": (Unauthorized, "EACCES", "the access key may not do this"),
    "AllAccessDisabled": (Unauthorized, "EACCES", "the access key may not do this"),
    "AccountProblem": (Unauthorized, "EACCES", "the account has a problem"),
    "ExpiredToken": (Unauthorized, "EACCES", "the access key has expired"),
    "InvalidToken": (Unauthorized, "EACCES", _KEY),
    "PreconditionFailed": (Conflict, "EEXIST", "it is not what it was expected to be"),
    "ConditionalRequestConflict": (Unreachable, "EAGAIN", "somebody else writes it now"),
    "OperationAborted": (Unreachable, "EAGAIN", "another operation is under way"),
    "NotImplemented": (Refused, "ENOTSUP", "this store cannot do that"),
    "MethodNotAllowed": (Refused, "ENOTSUP", "this store cannot do that"),
    "EntityTooLarge": (Refused, "EFBIG", "it is too large for this store"),
    "KeyTooLongError": (Refused, "ENAMETOOLONG", "the key is too long"),
    "QuotaExceeded": (Refused, "ENOSPC", "the quota is used up"),
    "XMinioStorageFull": (Refused, "ENOSPC", "the storage is full"),
    "XMinioAdminBucketQuotaExceeded": (Refused, "ENOSPC", "the quota is used up"),
    "InsufficientCapacity": (Refused, "ENOSPC", "the storage is full"),
    "ObjectLocked": (Refused, "EPERM", "the object is under a retention"),
    "BadDigest": (Unreachable, "ECHECKSUM", "the bytes were damaged on the way"),
    "XAmzContentSHA256Mismatch": (Unreachable, "ECHECKSUM", "the bytes were damaged on the way"),
    "XAmzContentChecksumMismatch": (Unreachable, "ECHECKSUM", "the bytes were damaged on the way"),
    "IncompleteBody": (Unreachable, "ECONNRESET", "the bytes did not all arrive"),
    "RequestTimeout": (Unreachable, "ETIMEDOUT", "the bytes did not arrive in time"),
    "SlowDown": (Unreachable, "EAGAIN", "the store asks to go slower"),
    "Throttling": (Unreachable, "EAGAIN", "the store asks to go slower"),
    "ThrottlingException": (Unreachable, "EAGAIN", "the store asks to go slower"),
    "TooManyRequests": (Unreachable, "EAGAIN", "the store asks to go slower"),
    "RequestLimitExceeded": (Unreachable, "EAGAIN", "the store asks to go slower"),
    "ServiceUnavailable": (Unreachable, "EAGAIN", "the store is not available now"),
    "InternalError": (Unreachable, "EIO", "the store has an internal error"),
}
_BY_STATUS: dict[int, str] = {
    401: "AccessDenied",
    403: "AccessDenied",
    404: "NoSuchKey",
    405: "MethodNotAllowed",
    408: "RequestTimeout",
    409: "OperationAborted",
    412: "PreconditionFailed",
    413: "EntityTooLarge",
    429: "SlowDown",
    501: "NotImplemented",
    503: "ServiceUnavailable",
    507: "InsufficientCapacity",
}
_REGION = frozenset(
    {"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "InvalidRegionName"}
)
_SKEW = frozenset({"RequestTimeTooSkewed", "RequestExpired"})


def from_answer(
    status: int, headers: Mapping[str, str], body: bytes, doing: str, path: str
) -> ProxyError:
    """The error that an answer tells, by the code in its body, else by its status."""
    code = message = ""
    region = headers.get("x-amz-bucket-region", "")
    if body:
        try:
            root = s3_xml.parse(body)
        except Corrupt:
            pass  # a proxy on the way speaks HTML
        else:
            code = root.value("Code") or ""
            message = root.value("Message") or ""
            region = root.value("Region") or region
    if code in _SKEW:
        return _skewed(headers, status, code)
    if code in _REGION or status in (301, 307):
        hint = f"; it is in '{region[:64]}'" if region else ""
        return Refused(
            f"EINVAL: the bucket is in another region than the remote says{hint}: "
            "put the region behind '#' at the end of the URL",
            code="EINVAL",
            data={"part": "region", "region": region[:64], "status": status, "s3Code": code},
        )
    return from_code(code, message, status, doing, path)


def from_code(code: str, message: str, status: int, doing: str, path: str) -> ProxyError:
    """As :func:`from_answer`, of a code that stands inside an answer of status 200."""
    known = _BY_CODE.get(code)
    if "WORM" in message or "object lock" in message.lower():
        known = _BY_CODE["ObjectLocked"] if code == "AccessDenied" else known
    if code == "InvalidRequest" and "larger than the maximum" in message:
        known = _BY_CODE["EntityTooLarge"]
    if known is None and status >= 500 and status not in (501, 507):
        known = (Unreachable, "EAGAIN" if status == 503 else "EIO", "the store has an error")
    if known is None and not (code and status in (400, 409)):
        known = _BY_CODE.get(_BY_STATUS.get(status, ""))
    if known is None:
        kind: type[ProxyError] = Unreachable if status >= 500 or status == 200 else Refused
        known = (kind, "EIO" if kind is Unreachable else "EINVAL", message[:200] or "refused")
    kind, name, text = known
    shown = f" ({code[:64]})" if code else f" (HTTP {status})"
    return kind(
        f"{name}: {text}{shown}, {doing} '{path}'",
        code=name,
        data={"path": path, "status": status, "s3Code": code[:64]},
    )


def _skewed(headers: Mapping[str, str], status: int, code: str) -> ProxyError:
    """The store's clock and ours differ by more than 15 minutes."""
    difference = ""
    try:
        there = email.utils.parsedate_to_datetime(headers.get("date", "")).timestamp()
    except ValueError:
        pass
    else:
        seconds = time.time() - there
        difference = f" by {abs(seconds):.0f} s ({'ahead' if seconds > 0 else 'behind'})"
    return Unauthorized(
        f"EACCES: the clock of this machine differs from the store's{difference}: set it right",
        code="EACCES",
        data={"part": "clock", "status": status, "s3Code": code},
    )
