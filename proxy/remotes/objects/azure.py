"""Azure Blob Storage and its emulator azurite as an object store.

Facts are Microsoft's "Blob service REST API", version :data:`~.azure_client.VERSION`.  Only block
blobs are made, in the account's usual access tier.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import uuid
from typing import TYPE_CHECKING, Any, Final

import trio

from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Unreachable
from proxy.formats.azure_batch import LARGEST_ANSWER, MOST, dump_batch, load_batch
from proxy.formats.azure_xml import LARGEST, http_date, load_page
from proxy.remotes.objects.azure_client import Answer, AzureClient
from proxy.remotes.objects.azure_errors import unclear
from proxy.remotes.objects.azure_probe import probe
from proxy.remotes.objects.azure_upload import LARGEST_BLOCK, MOST_BLOCKS, AzureUpload
from proxy.remotes.objects.store import Condition, Limits, Listed, ObjectStat, Page, UploadPage
from proxy.runtime.deadlines import undo_within
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


MIB: Final = 1024 * 1024
_PAGE: Final = 5000
_HOP: Final = 256 * 1024
_ALONE: Final = 8
"""Deletes at once where there are no batches."""
FIRST_WAIT = 0.1
"""Seconds between looks at a copy that is under way, growing."""
_COPY_SECONDS: Final = 600.0
"""How long a copy that the service does in its own time may make no progress."""
_POLICIES: Final = ("x-ms-has-immutability-policy", "x-ms-has-legal-hold")
_UNDO_SECONDS: Final = 10.0

LIMITS: Final = Limits(
    smallest_part=4 * MIB,  # a size to begin with: the service takes smaller ones
    largest_part=LARGEST_BLOCK,
    most_parts=MOST_BLOCKS,
    largest_put=5000 * MIB,
    largest_copy=MOST_BLOCKS * LARGEST_BLOCK,  # Copy Blob takes whatever is a blob
    most_deletes=MOST,
)


class AzureStore:
    """See :class:`proxy.remotes.objects.store.ObjectStore`; one container of one account."""

    limits = LIMITS

    def __init__(
        self, client: AzureClient, *, checks_data: bool = False, probe_prefix: str = ""
    ) -> None:
        """``checks_data``: send an MD5 of all data, for connections that protect nothing.

        ``probe_prefix`` is where :meth:`capabilities` may write and remove.
        """
        self.client = client
        self.copies_ranges = True
        """Until the service says that it does not."""
        self._checks_data = checks_data
        self._batches = True
        self._capabilities: Mapping[str, Any] | None = None
        self._probe_prefix = probe_prefix
        self._probing = trio.Lock()

    async def make_container(self) -> None:
        """As Xen Orchestra does; no error when it is there."""
        answer = await self.client.ask("PUT", "PUT", query={"restype": "container"})
        exists = answer.headers.get("x-ms-error-code") == "ContainerAlreadyExists"
        if not (answer.status == 409 and exists):
            self.client.expect(answer, 201, "making the container", self.client.place.container)

    async def object_lock(self) -> tuple[bool, str]:
        """Whether a policy or a legal hold keeps blobs from being changed; and what the server
        calls itself.

        Immutability of single versions does not count: a blob can be replaced there.
        """
        container = self.client.place.container
        answer = await self.client.ask("HEAD", "HEAD", query={"restype": "container"})
        self.client.expect(answer, 200, "looking at the container", container)
        locked = any(answer.headers.get(name, "").lower() == "true" for name in _POLICIES)
        return locked, answer.headers.get("server", "")[:64]

    async def get(self, key: str, *, limit: int) -> bytes:
        async with self.client.exchange("GET", "GET", key) as exchange:
            if exchange.status != 200:
                failure = await self.client.failure(exchange, "reading", key)
            elif "content-length" not in exchange.headers:
                failure = unclear("the store does not say how much it sends", "reading", key)
            else:
                content = await exchange.read_all(limit)
                if content is not None:
                    return content
                failure = Corrupt(
                    f"'{key}' is larger than the {limit} bytes that it may have",
                    data={"path": key, "limit": limit},
                )
        raise failure

    async def get_into(self, key: str, offset: int, buffer: memoryview, *, etag: str = "") -> int:
        if not buffer:
            return 0
        headers = {"x-ms-range": f"bytes={offset}-{offset + len(buffer) - 1}"}
        if etag:
            headers["If-Match"] = etag
        async with self.client.exchange("GET", "GET", key, headers=headers) as exchange:
            if exchange.status == 206:
                expected = _range(exchange.headers, offset, len(buffer), key)
                count = await exchange.read_into(buffer[:expected])
                if count == expected:
                    return count
                raise Unreachable(
                    f"the store sent {count} of {expected} bytes of '{key}'", code="ECONNRESET"
                )
            if exchange.status == 416:
                await exchange.read_all(_HOP)
                return 0
            if exchange.status < 300:
                raise unclear("the store ignores ranges", "reading", key)
            failure = await self.client.failure(exchange, "reading", key)
        if isinstance(failure, Conflict):
            raise Conflict(
                f"ESTALE: '{key}' has changed while it was read", code="ESTALE", data=failure.data
            ) from failure
        raise failure

    async def put(
        self, key: str, data: bytes | memoryview, *, condition: Condition | None = None
    ) -> str:
        answer = await self.put_body(
            key,
            data,
            query={},
            headers={"x-ms-blob-type": "BlockBlob", "Content-Type": "application/octet-stream"},
            condition=condition,
            doing="writing",
        )
        return answer.headers.get("etag", "")

    async def put_body(
        self,
        key: str,
        data: bytes | memoryview,
        *,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        condition: Condition | None,
        doing: str,
    ) -> Answer:
        """A PUT that the service must answer with 201."""
        headers = {**headers, **_conditional(condition)}
        if self._checks_data:
            headers["Content-MD5"] = await _md5(data)
        answer = await self.client.ask("PUT", "PUT", key, query=query, headers=headers, body=data)
        self.client.expect(answer, 201, doing, key)
        return answer

    async def head(self, key: str) -> ObjectStat:
        answer = await self._properties(key)
        headers = answer.headers
        try:
            return ObjectStat(
                int(headers["content-length"]), http_date(headers["last-modified"]), headers["etag"]
            )
        except (KeyError, ValueError) as error:
            raise unclear("the store does not say what it is", "looking at", key) from error

    async def _properties(self, key: str) -> Answer:
        answer = await self.client.ask("HEAD", "HEAD", key)
        self.client.expect(answer, 200, "looking at", key)
        return answer

    async def list(self, prefix: str, *, deep: bool, token: str | None = None) -> Page:
        query = {"restype": "container", "comp": "list", "maxresults": str(_PAGE)}
        if prefix:
            query["prefix"] = prefix
        if not deep:
            query["delimiter"] = "/"
        if token is not None:
            query["marker"] = token
        answer = await self.client.ask("LIST", "GET", query=query, limit=LARGEST)
        self.client.expect(answer, 200, "listing", prefix)
        try:
            if len(answer.body) < _HOP:
                page = load_page(answer.body, token)
            else:
                page = await in_thread(Work.CPU, load_page, answer.body, token)
        except Corrupt as error:
            raise unclear(error.message, "listing", prefix) from error
        objects = tuple(Listed(blob.name, blob.size, blob.mtime) for blob in page.blobs)
        return Page(objects, page.prefixes, page.marker)

    async def delete(self, key: str, *, condition: Condition | None = None) -> None:
        """A blob of which somebody made snapshots is kept, ``Refused`` (``EPERM``)."""
        answer = await self.client.ask("DELETE", "DELETE", key, headers=_conditional(condition))
        error = self._deleted(key, answer)
        if isinstance(error, Conflict) and condition is not None:
            # the condition does not hold for a blob that is gone either
            try:
                await self.head(key)
            except NotFound as missing:
                if missing.code == "ENOENT":
                    return
        if error is not None:
            raise error

    def _deleted(self, key: str, answer: Answer) -> ProxyError | None:
        if answer.status == 202:
            return None
        error = self.client.error(answer, "removing", key)
        return None if isinstance(error, NotFound) and error.code == "ENOENT" else error

    async def delete_many(self, keys: Sequence[str]) -> Sequence[ProxyError | None]:
        """One request; one for each key where the service takes no batches."""
        if self._batches and len(keys) > 1:
            outcomes = await self._delete_batch(keys)
            if outcomes is not None:
                return outcomes
            self._batches = False
        return await self._delete_each(keys)

    async def _delete_batch(self, keys: Sequence[str]) -> Sequence[ProxyError | None] | None:
        """``None`` where the service does not know batches."""
        boundary = f"batch_{uuid.uuid4()}"
        requests = [
            (
                "DELETE",
                path,
                {**self.client.signed("DELETE", path, {}, {}), "Content-Length": "0"},
            )
            for path in map(self.client.path, keys)
        ]
        answer = await self.client.ask(
            "BATCH",
            "POST",
            query={"restype": "container", "comp": "batch"},
            headers={"Content-Type": f"multipart/mixed; boundary={boundary}"},
            body=dump_batch(boundary, requests),
            limit=LARGEST_ANSWER,
        )
        if answer.status in (400, 405, 501):
            return None
        self.client.expect(answer, 202, f"removing {len(keys)} blobs like", keys[0])
        try:
            parts = load_batch(answer.headers.get("content-type", ""), answer.body, len(keys))
        except Corrupt as error:
            raise unclear(error.message, f"removing {len(keys)} blobs like", keys[0]) from error
        outcomes: list[ProxyError | None] = []
        for number, key in enumerate(keys):
            part = parts.get(number)
            if part is None:
                outcomes.append(unclear("the store does not say whether it did", "removing", key))
            else:
                outcomes.append(self._deleted(key, Answer(part.status, part.headers, part.body)))
        return outcomes

    async def _delete_each(self, keys: Sequence[str]) -> Sequence[ProxyError | None]:
        outcomes: list[ProxyError | None] = [None] * len(keys)
        places = trio.CapacityLimiter(_ALONE)

        async def delete(number: int, key: str) -> None:
            async with places:
                try:
                    await self.delete(key)
                except ProxyError as error:
                    outcomes[number] = error

        async with trio.open_nursery() as nursery:
            for number, key in enumerate(keys):
                nursery.start_soon(delete, number, key)
        return outcomes

    async def copy(self, source: str, target: str) -> None:
        """The service may take its time: then its progress is asked for.

        On an error or a cancel meanwhile the copy is stopped and what there is of it removed.
        """
        answer = await self.client.ask(
            "COPY",
            "PUT",
            target,
            headers={"x-ms-copy-source": self.client.place.origin + self.client.path(source)},
        )
        self.client.expect(answer, 202, f"copying '{source}' to", target)
        copy = answer.headers.get("x-ms-copy-id", "")
        if answer.headers.get("x-ms-copy-status") == "success":
            return
        try:
            await self._copied(target, copy)
        except BaseException as error:
            try:
                with undo_within(f"stopping the copy to '{target}'", _UNDO_SECONDS):
                    await self._stop_copy(target, copy)
            except ProxyError as undo:
                error.add_note(f"and a part of the copy is left behind: {undo.message}")
            raise

    async def _copied(self, target: str, copy: str) -> None:
        wait, progress = FIRST_WAIT, ""
        last = trio.current_time()
        while True:
            headers = (await self._properties(target)).headers
            status = headers.get("x-ms-copy-status", "")
            if headers.get("x-ms-copy-id") != copy:
                raise Conflict(
                    f"ESTALE: somebody else wrote '{target}' while it was copied to",
                    code="ESTALE",
                    data={"path": target},
                )
            if status == "success":
                return
            if status != "pending":
                reason = headers.get("x-ms-copy-status-description", "")[:256]
                raise Unreachable(
                    f"EIO: the store gave up copying to '{target}': {status} {reason}".rstrip(),
                    code="EIO",
                    data={"path": target, "azureCode": status},
                )
            if headers.get("x-ms-copy-progress", "") != progress:
                progress = headers.get("x-ms-copy-progress", "")
                last = trio.current_time()
            elif trio.current_time() - last > _COPY_SECONDS:
                raise Unreachable(
                    f"ETIMEDOUT: the store makes no progress copying to '{target}'",
                    code="ETIMEDOUT",
                    data={"path": target},
                )
            await trio.sleep(wait)
            wait = min(wait * 1.5, 5)

    async def _stop_copy(self, target: str, copy: str) -> None:
        """Leave neither a copy under way nor the empty blob that a stopped one is."""
        await self.client.ask(
            "COPY",
            "PUT",
            target,
            query={"comp": "copy", "copyid": copy},
            headers={"x-ms-copy-action": "abort"},
        )
        try:
            headers = (await self._properties(target)).headers
        except NotFound:
            return
        if headers.get("x-ms-copy-id") == copy and headers.get("x-ms-copy-status") != "success":
            with contextlib.suppress(Conflict):
                await self.delete(target, condition=Condition(etag=headers.get("etag", "")))

    async def upload(self, key: str) -> AzureUpload:
        """Sends nothing: an upload begins with its first part."""
        await trio.lowlevel.checkpoint()
        return AzureUpload(self, key)

    async def open_uploads(
        self, prefix: str, *, token: tuple[str, str] | None = None
    ) -> UploadPage:
        """None: the service tells names that have nothing but uncommitted blocks (List Blobs with
        ``include=uncommittedblobs``), but neither when these came nor by whom, and it forgets
        them itself, a week after the last one.  See :meth:`AzureUpload.abort` for the rest."""
        del prefix, token
        await trio.lowlevel.checkpoint()
        return UploadPage((), None)

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """Nothing to send, as :meth:`AzureUpload.abort`."""
        del key, upload_id
        await trio.lowlevel.checkpoint()

    async def capabilities(self) -> Mapping[str, Any]:
        """See :mod:`~proxy.remotes.objects.azure_probe`."""
        async with self._probing:
            if self._capabilities is None:
                self._capabilities = await probe(self, self._probe_prefix)
        return {
            **self._capabilities,
            "batchDelete": self._batches,
            "copyRange": self.copies_ranges,
        }

    def requests(self) -> Mapping[str, int]:
        return dict(self.client.counts)

    async def aclose(self) -> None:
        self.client.close()
        await trio.lowlevel.checkpoint()


def _conditional(condition: Condition | None) -> dict[str, str]:
    if condition is None:
        return {}
    if condition.absent:
        return {"If-None-Match": "*"}
    return {} if condition.etag is None else {"If-Match": condition.etag}


def _range(headers: Mapping[str, str], offset: int, length: int, key: str) -> int:
    """How many bytes the answer to a range has; it must be the range that was asked for."""
    text = headers.get("content-range", "")
    span, _, total = text.removeprefix("bytes ").partition("/")
    first, _, last = span.partition("-")
    if all(part.isdecimal() and len(part) < 19 for part in (first, last, total)):
        if int(total) <= offset and headers.get("content-length") == "0":
            return 0  # what azurite says at the end
        end = min(offset + length, int(total))
        if int(first) == offset and int(last) + 1 == end > offset:
            return end - offset
    raise unclear("the store answers another range than asked for", "reading", key)


async def _md5(data: bytes | memoryview) -> str:
    def digest() -> str:
        return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()

    return digest() if len(data) < _HOP else await in_thread(Work.CPU, digest)
