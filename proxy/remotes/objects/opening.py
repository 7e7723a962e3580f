"""From the URL of an object store to an open remote."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from proxy.errors import NotFound, ProxyError, Refused, Unauthorized
from proxy.remotes.objects.parts import BUDGET
from proxy.remotes.objects.remote import ObjectRemote
from proxy.remotes.objects.retrying import OPENING_SECONDS, RetryingStore
from proxy.remotes.objects.s3 import LIMITS, S3Store
from proxy.remotes.objects.s3_client import S3Client
from proxy.remotes.objects.s3_endpoint import S3Endpoint
from proxy.runtime.deadlines import deadline
from proxy.runtime.transport import NO_CONNECTION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.remotes.objects.store import Limits
    from proxy.remotes.url import S3Url

_OPTIONS = {
    # of the URL's query, as upstream names them: field of Limits
    "minPartSize": "smallest_part",
    "maxPartSize": "largest_part",
    "maxPartNumber": "most_parts",
}


async def open_s3(
    url: S3Url, record: Mapping[str, Any], *, seconds: float, open_seconds: float
) -> ObjectRemote:
    """Check that bucket and credentials work, and whether its objects are immutable.

    ``record`` holds the remote's options; ``seconds`` is how long the server may be silent, and
    ``open_seconds`` bounds the whole check.  What is wrong is named in ``data.part``: of a server
    that refuses connections after 5 s, of one that does not answer them after 10 s.  On cancel
    nothing stays open.
    """
    endpoint = S3Endpoint.of(url)
    limits = _limits(record)
    client = S3Client(
        endpoint,
        access_key=url.username,
        secret_key=url.password,
        allow_unauthorized=record.get("allowUnauthorized") is True,
        seconds=seconds,
    )
    below = f"{endpoint.prefix}/" if endpoint.prefix else ""
    store = S3Store(client, limits=limits, probe_prefix=below)
    retrying = RetryingStore(store)
    try:
        with deadline("opening the remote", open_seconds):
            locked = await retrying.again(lambda _: store.object_lock(), seconds=OPENING_SECONDS)
            # the question above may be one that any key may ask; this one is for our objects
            await retrying.again(lambda _: store.list(below, deep=False), seconds=OPENING_SECONDS)
    except BaseException as error:
        client.close()
        if isinstance(error, ProxyError):
            raise _explained(error, endpoint) from error
        raise
    return ObjectRemote(
        retrying,
        endpoint.prefix,
        url=url.public,
        is_immutable=locked or record.get("immutable") is True,
    )


def _limits(record: Mapping[str, Any]) -> Limits:
    given: dict[str, Any] = {}
    for option, field in _OPTIONS.items():
        value = record.get(option)
        if value is None or value is False:
            continue
        highest = BUDGET // 2 if field == "smallest_part" else getattr(LIMITS, field)
        lowest = LIMITS.smallest_part if field != "most_parts" else 1
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise Refused(
                f"remote URL: query key '{option}' must be a whole number from {lowest} to"
                f" {highest}",
                code="EINVAL",
                data={"part": option},
            )
        given[field] = value
    return replace(LIMITS, **given)


def _explained(error: ProxyError, endpoint: S3Endpoint) -> ProxyError:
    """The same with the part of the remote that it is about."""
    part = error.data.get("part")
    place = f"S3 at {endpoint.host}, bucket '{endpoint.bucket}'"
    if error.code == "ENOBUCKET":
        part = "bucket"
    elif isinstance(error, NotFound):
        # no answer of a store that has the bucket
        data = {**error.data, "part": part or "host"}
        return NotFound(
            f"{place}: {error.code}: this server does not answer as S3 does"
            f" (HTTP {error.data.get('status')}): check host and port of the URL",
            code=error.code,
            data=data,
        )
    elif error.code in NO_CONNECTION:
        part = part or "host"
    elif isinstance(error, Unauthorized):
        code = error.data.get("s3Code")
        part = part or {
            "InvalidAccessKeyId": "username",
            "SignatureDoesNotMatch": "password",
        }.get(str(code), "username")
    data = {**error.data, **({"part": part} if part else {})}
    return type(error)(f"{place}: {error.message}", code=error.code, data=data)
