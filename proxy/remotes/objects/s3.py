"""S3 as an :class:`~proxy.remotes.objects.store.ObjectStore`: Amazon's and what speaks like it.

Addresses are path-style (``/bucket/key``), as Xen Orchestra's: names of buckets with dots have no
certificate otherwise.  Requests and answers follow the Amazon S3 API Reference of 2006-03-01.
"""

from __future__ import annotations

import datetime
import email.utils
import re
from typing import TYPE_CHECKING, Any

import trio

from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Refused, Unauthorized, Unreachable
from proxy.formats import s3_xml, sigv4
from proxy.remotes.objects.s3_client import S3Client, confirmed, raise_for
from proxy.remotes.objects.s3_errors import from_code
from proxy.remotes.objects.s3_probe import probe
from proxy.remotes.objects.s3_upload import S3Upload
from proxy.remotes.objects.s3_uploads import list_uploads
from proxy.remotes.objects.store import Condition, Limits, Listed, ObjectStat, Page

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.formats.s3_xml import Element
    from proxy.remotes.objects.store import Upload, UploadPage

_MIB = 1024 * 1024
_GIB = 1024 * _MIB
LIMITS = Limits(
    smallest_part=5 * _MIB,
    largest_part=5 * _GIB,
    most_parts=10_000,
    largest_put=5 * _GIB,
    largest_copy=5 * _GIB,
    most_deletes=1000,
)
"""Amazon S3 User Guide, "Amazon S3 multipart upload limits"."""
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)\Z")


class S3Store:
    """One bucket.  ``probe_prefix`` is where :meth:`capabilities` may write and remove."""

    def __init__(
        self, client: S3Client, *, limits: Limits = LIMITS, probe_prefix: str = ""
    ) -> None:
        self.limits = limits
        self._client = client
        self._probe_prefix = probe_prefix
        self._probing = trio.Lock()
        self._capabilities: Mapping[str, Any] | None = None
        self._locked: bool | None = None

    # -- reading

    async def get(self, key: str, *, limit: int) -> bytes:
        async with self._client.open("GET", "GET", key) as exchange:
            await raise_for(exchange, "reading", key)
            content = await exchange.read_all(limit)
            if content is None:
                raise Corrupt(
                    f"'{key}' has more than {limit} bytes", data={"path": key, "limit": limit}
                )
            return content

    async def get_into(self, key: str, offset: int, buffer: memoryview, *, etag: str = "") -> int:
        if not buffer:
            await trio.lowlevel.checkpoint()
            return 0
        last = offset + len(buffer) - 1
        headers = {"range": f"bytes={offset}-{last}"}
        if etag:
            headers["if-match"] = etag
        async with self._client.open("GET", "GET", key, headers=headers) as exchange:
            if exchange.status == 416:  # at or behind the end
                await exchange.read_all(s3_xml.LARGEST)
                return 0
            if exchange.status == 412:
                raise _replaced(key)
            await raise_for(exchange, "reading", key)
            if etag and exchange.headers.get("etag", etag) != etag:
                raise _replaced(key)  # a server that ignores the condition
            length = _length_of_range(exchange.status, exchange.headers, offset, last)
            if length is None:
                raise Unreachable(
                    f"EPROTO: the store sends other bytes of '{key}' than were asked for",
                    code="EPROTO",
                    data={"path": key},
                )
            count = await exchange.read_into(buffer[:length])
            if count < length:
                raise Unreachable(
                    f"ECONNRESET: '{key}' ended after {count} of {length} bytes",
                    code="ECONNRESET",
                    data={"path": key},
                )
            return count

    async def head(self, key: str) -> ObjectStat:
        async with self._client.open("HEAD", "HEAD", key) as exchange:
            await raise_for(exchange, "looking at", key)
            headers = exchange.headers
        length = headers.get("content-length", "")
        if not length.isdecimal():
            raise Unreachable(f"EPROTO: the store tells no size of '{key}'", code="EPROTO")
        return ObjectStat(int(length), _http_date(headers), headers.get("etag", ""))

    async def list(self, prefix: str, *, deep: bool, token: str | None = None) -> Page:
        query = [("list-type", "2"), ("prefix", prefix), ("encoding-type", "url")]
        if not deep:
            query.append(("delimiter", "/"))
        if token is not None:
            query.append(("continuation-token", token))
        _, content = await self._client.call("LIST", "GET", None, doing="listing", query=query)
        root = confirmed(content, "ListBucketResult", "listing", prefix)
        encoded = root.value("EncodingType") == "url"
        try:
            objects = [_listed(each, prefix, encoded=encoded) for each in root.all("Contents")]
            prefixes = [
                _below(s3_xml.decoded(each.value("Prefix"), encoded=encoded), prefix)
                for each in root.all("CommonPrefixes")
            ]
            following = _next(root, token)
        except (ValueError, TypeError) as error:
            raise Unreachable(
                f"EPROTO: the store's listing of '{prefix}' is not whole: {error}",
                code="EPROTO",
                data={"path": prefix},
            ) from error
        return Page(objects, prefixes, following)

    # -- writing

    async def put(
        self, key: str, data: bytes | memoryview, *, condition: Condition | None = None
    ) -> str:
        headers, _ = await self._client.call(
            "PUT", "PUT", key, doing="writing", body=data, headers=condition_headers(condition)
        )
        return headers.get("etag", "")

    async def upload(self, key: str) -> Upload:
        query = [("uploads", "")]
        _, content = await self._client.call("POST", "POST", key, doing="writing", query=query)
        root = confirmed(content, "InitiateMultipartUploadResult", "writing", key)
        upload_id = root.value("UploadId")
        if not upload_id:
            raise Unreachable(f"EPROTO: the store gives no upload for '{key}'", code="EPROTO")
        return S3Upload(self._client, key, upload_id, is_ours=True)

    async def open_uploads(
        self, prefix: str, *, token: tuple[str, str] | None = None
    ) -> UploadPage:
        return await list_uploads(self._client, prefix, token)

    async def abort_upload(self, key: str, upload_id: str) -> None:
        await S3Upload(self._client, key, upload_id).abort()

    async def copy(self, source: str, target: str) -> None:
        """The source's name is percent-encoded, which upstream forgets."""
        name = sigv4.encode_path(f"/{self._client.endpoint.bucket}/{source}")
        _, content = await self._client.call(
            "COPY", "PUT", target, doing="copying to", headers={"x-amz-copy-source": name}
        )
        result = confirmed(content, "CopyObjectResult", "copying to", target)
        if not result.value("ETag"):
            raise Unreachable(
                f"EPROTO: the store does not confirm the copy to '{target}'",
                code="EPROTO",
                data={"path": target},
            )

    # -- removing

    async def delete(self, key: str, *, condition: Condition | None = None) -> None:
        try:
            await self._client.call(
                "DELETE", "DELETE", key, doing="removing", headers=condition_headers(condition)
            )
        except NotFound as error:
            if error.code != "ENOENT":
                raise

    async def delete_many(self, keys: Sequence[str]) -> Sequence[ProxyError | None]:
        """Each key's outcome is what the answer says of it; of one that it is silent about,
        nothing is known (``Unreachable``)."""
        sendable = [key for key in keys if s3_xml.can_hold(key)]
        outcomes: dict[str, ProxyError | None] = {}
        if sendable:
            _, content = await self._client.call(
                "POST",
                "POST",
                None,
                doing=f"removing {len(sendable)} objects from '{sendable[0]}' on, in",
                query=[("delete", "")],
                headers={"content-md5": "", "content-type": "application/xml"},
                body=s3_xml.delete_request(sendable),
            )
            root = confirmed(content, "DeleteResult", "removing", keys[0])
            for each in root.all("Deleted"):
                outcomes[each.value("Key") or ""] = None
            for each in root.all("Error"):
                key, code = each.value("Key") or "", each.value("Code") or ""
                gone = code in ("NoSuchKey", "NoSuchVersion")
                outcomes[key] = (
                    None
                    if gone
                    else from_code(code, each.value("Message") or "", 200, "removing", key)
                )
        for key in keys:
            if not s3_xml.can_hold(key):
                try:
                    await self.delete(key)
                    outcomes[key] = None
                except ProxyError as error:
                    outcomes[key] = error
        return [outcomes.get(key, _unconfirmed(key)) for key in keys]

    # -- what it is

    async def object_lock(self) -> bool:
        """Whether the bucket keeps objects from being changed; asked once.

        Where that may not be asked, bodies carry Content-MD5 to be on the safe side.
        ``NotFound`` (``ENOBUCKET``), ``Unauthorized`` for wrong credentials.
        """
        if self._locked is None:
            try:
                _, content = await self._client.call(
                    "GET", "GET", None, doing="looking at", query=[("object-lock", "")]
                )
            except NotFound as error:
                if error.code != "ENOENT":
                    raise
                self._locked = False
            except Unauthorized as error:
                if error.data.get("s3Code") not in ("AccessDenied", ""):
                    raise
                self._client.content_md5 = True
                self._locked = False
            except Refused as error:
                if error.code != "ENOTSUP":
                    raise
                self._locked = False
            else:
                root = confirmed(content, "ObjectLockConfiguration", "looking at", "")
                self._locked = root.value("ObjectLockEnabled") == "Enabled"
                self._client.content_md5 = self._locked
        return self._locked

    async def capabilities(self) -> Mapping[str, Any]:
        async with self._probing:
            if self._capabilities is None:
                found = await probe(self, self._client, self._probe_prefix)
                self._capabilities = {
                    **found,
                    "objectLock": await self.object_lock(),
                    "contentMd5": self._client.content_md5,
                }
        return self._capabilities

    def requests(self) -> Mapping[str, int]:
        return dict(self._client.requests)

    async def aclose(self) -> None:
        self._client.close()
        await trio.lowlevel.checkpoint()


def condition_headers(condition: Condition | None) -> dict[str, str]:
    if condition is None:
        return {}
    if condition.absent:
        return {"if-none-match": "*"}
    return {} if condition.etag is None else {"if-match": condition.etag}


def _length_of_range(status: int, headers: Mapping[str, str], first: int, last: int) -> int | None:
    """How many bytes of the body are those asked for; ``None`` when they are others."""
    if status == 206:
        match = _RANGE.match(headers.get("content-range", ""))
        if match is None or int(match[1]) != first or not first <= int(match[2]) <= last:
            return None
        total = match[3]
        if int(match[2]) < last and total != "*" and int(match[2]) != int(total) - 1:
            return None  # fewer than asked for, and not because it ends there
        return int(match[2]) - first + 1
    length = headers.get("content-length", "")
    if first or not length.isdecimal():
        return None
    return min(int(length), last + 1)  # the whole object, by a server that knows no ranges


def _replaced(key: str) -> Conflict:
    return Conflict(
        f"ESTALE: '{key}' was replaced while it was read", code="ESTALE", data={"path": key}
    )


def _unconfirmed(key: str) -> Unreachable:
    return Unreachable(
        f"EPROTO: the store does not say whether it removed '{key}'",
        code="EPROTO",
        data={"path": key},
    )


def _below(key: str, prefix: str) -> str:
    if not key.startswith(prefix):
        raise ValueError("it holds names that were not asked for")
    return key


def _listed(element: Element, prefix: str, *, encoded: bool) -> Listed:
    size, modified = element.value("Size") or "", element.value("LastModified") or ""
    if not size.isdecimal():
        raise ValueError("an entry has no size")
    return Listed(
        _below(s3_xml.decoded(element.value("Key"), encoded=encoded), prefix),
        int(size),
        datetime.datetime.fromisoformat(modified).timestamp(),
    )


def _next(root: Element, token: str | None) -> str | None:
    truncated = (root.value("IsTruncated") or "").strip().lower()
    if truncated == "false":
        return None
    following = root.value("NextContinuationToken")
    if truncated != "true":
        raise ValueError("it does not say whether it is")
    if not following:
        raise ValueError("it goes on, but does not say where")
    if following == token:
        raise ValueError("it goes on where it is")
    return following


def _http_date(headers: Mapping[str, str]) -> float:
    try:
        return email.utils.parsedate_to_datetime(headers.get("last-modified", "")).timestamp()
    except ValueError:
        return 0.0
