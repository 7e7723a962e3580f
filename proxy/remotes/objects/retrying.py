"""Sends again what an object store failed to do for a reason that passes.

Only ``Unreachable`` passes: a reset, a time-out, an internal error, "slow down".  A wrong key, a
missing object, a refusal or a certificate that is not trusted are the same the second time.  A
missing bucket or container is made ``Unreachable`` here (and not tried again): it must not look
like a directory that is empty.

A request whose answer was lost may have been done.  What is the same when done twice is simply
sent again.  Of a write under a condition, the second try is refused by the first one's effect:
then what is there is compared with what was sent, so that neither our own write is taken for
somebody else's nor somebody else's for ours.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from proxy.errors import Conflict, NotFound, Unreachable
from proxy.runtime.transport import CERTIFICATE_CODES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from proxy.errors import ProxyError
    from proxy.remotes.objects.store import (
        Condition,
        ObjectStat,
        ObjectStore,
        Page,
        Upload,
        UploadPage,
    )

T = TypeVar("T")

WAITS = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between the tries, each shortened by up to a half so that not all come at once."""
OPENING_SECONDS = 5.0
"""How long an opening is tried again: somebody may be waiting for what is wrong, and Xen Orchestra
waits 5 s for ``remote.getInfo``."""


_UNKNOWN = Unreachable("not tried yet")


class RetryingStore:
    """See :class:`proxy.remotes.objects.store.ObjectStore`."""

    def __init__(self, inner: ObjectStore, *, waits: Sequence[float] = WAITS) -> None:
        self.limits = inner.limits
        self._inner = inner
        self._waits = waits

    async def again(self, run: Callable[[int], Awaitable[T]], *, seconds: float = math.inf) -> T:
        """``run(tries)`` until it does not fail for a passing reason; ``tries`` counts from 0.

        No try begins later than ``seconds`` behind the first one.
        """
        began = trio.current_time()
        try:
            for tries, most in enumerate(self._waits):
                wait = most * random.uniform(0.5, 1)  # noqa: S311 (no secret)
                try:
                    return await run(tries)
                except Unreachable as error:
                    if error.code in CERTIFICATE_CODES:
                        raise
                    if trio.current_time() + wait - began > seconds:
                        raise
                    await trio.sleep(wait)
            return await run(len(self._waits))
        except NotFound as error:
            if error.code != "ENOBUCKET":
                raise
            # whoever asks for a file or a directory would take it for an empty one
            raise Unreachable(error.message, code=error.code, data=error.data) from error

    async def get(self, key: str, *, limit: int) -> bytes:
        return await self.again(lambda _: self._inner.get(key, limit=limit))

    async def get_into(self, key: str, offset: int, buffer: memoryview, *, etag: str = "") -> int:
        return await self.again(lambda _: self._inner.get_into(key, offset, buffer, etag=etag))

    async def head(self, key: str) -> ObjectStat:
        return await self.again(lambda _: self._inner.head(key))

    async def list(self, prefix: str, *, deep: bool, token: str | None = None) -> Page:
        return await self.again(lambda _: self._inner.list(prefix, deep=deep, token=token))

    async def put(
        self, key: str, data: bytes | memoryview, *, condition: Condition | None = None
    ) -> str:
        """An exclusive write that was repeated counts as ours when the same bytes are there."""

        async def run(tries: int) -> str:
            try:
                return await self._inner.put(key, data, condition=condition)
            except (Conflict, NotFound):
                if tries == 0 or condition is None:
                    raise
                etag = await self._etag_of(key, data)
                if etag is None:
                    raise
                return etag

        return await self.again(run)

    async def _etag_of(self, key: str, data: bytes | memoryview) -> str | None:
        """The object's etag if its content is ``data``."""
        try:
            status = await self._inner.head(key)
            if status.size != len(data):
                return None
            content = memoryview(bytearray(status.size))
            count = await self._inner.get_into(key, 0, content, etag=status.etag)
        except (NotFound, Conflict):
            return None
        return status.etag if count == len(data) and content == data else None

    async def delete(self, key: str, *, condition: Condition | None = None) -> None:
        async def run(tries: int) -> None:
            try:
                await self._inner.delete(key, condition=condition)
            except Conflict:
                if tries == 0:
                    raise
                try:
                    await self._inner.head(key)
                except NotFound:
                    return  # removed by the try whose answer was lost
                raise

        await self.again(run)

    async def delete_many(self, keys: Sequence[str]) -> Sequence[ProxyError | None]:
        """Those that failed for a passing reason are sent again, alone."""
        outcomes: dict[str, ProxyError | None] = {}

        async def run(_tries: int) -> None:
            left = [key for key in keys if isinstance(outcomes.get(key, _UNKNOWN), Unreachable)]
            outcomes.update(zip(left, await self._inner.delete_many(left), strict=True))
            passing = [each for each in outcomes.values() if isinstance(each, Unreachable)]
            if passing:
                raise passing[0]

        try:
            await self.again(run)
        except Unreachable as error:
            return [outcomes.get(key, error) for key in keys]
        return [outcomes[key] for key in keys]

    async def copy(self, source: str, target: str) -> None:
        await self.again(lambda _: self._inner.copy(source, target))

    async def upload(self, key: str) -> Upload:
        return _Upload(self, self._inner, key, await self.again(lambda _: self._inner.upload(key)))

    async def open_uploads(
        self, prefix: str, *, token: tuple[str, str] | None = None
    ) -> UploadPage:
        return await self.again(lambda _: self._inner.open_uploads(prefix, token=token))

    async def abort_upload(self, key: str, upload_id: str) -> None:
        await self.again(lambda _: self._inner.abort_upload(key, upload_id))

    async def capabilities(self) -> Mapping[str, Any]:
        return await self.again(lambda _: self._inner.capabilities())

    def requests(self) -> Mapping[str, int]:
        return self._inner.requests()

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Upload:
    def __init__(self, owner: RetryingStore, store: ObjectStore, key: str, inner: Upload) -> None:
        self._owner = owner
        self._store = store
        self._key = key
        self._inner = inner
        self._sizes: dict[int, int] = {}

    async def send(self, number: int, data: bytes | memoryview) -> None:
        await self._owner.again(lambda _: self._inner.send(number, data))
        self._sizes[number] = len(data)

    async def copy(self, number: int, source: str, offset: int, length: int) -> None:
        await self._owner.again(lambda _: self._inner.copy(number, source, offset, length))
        self._sizes[number] = length

    async def complete(self, *, condition: Condition | None = None) -> None:
        """A repeated one that finds the upload gone has succeeded if the object is there with
        the size of all parts."""

        async def run(tries: int) -> None:
            try:
                await self._inner.complete(condition=condition)
            except (NotFound, Conflict):
                if tries == 0 or not await self._is_there():
                    raise

        await self._owner.again(run)

    async def _is_there(self) -> bool:
        try:
            return (await self._store.head(self._key)).size == sum(self._sizes.values())
        except NotFound:
            return False

    async def abort(self) -> None:
        await self._owner.again(lambda _: self._inner.abort())
