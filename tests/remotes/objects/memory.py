"""An object store in memory, for what needs a virtual clock or limits of a few bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import trio

from proxy.errors import Conflict, NotFound, ProxyError, Refused
from proxy.remotes.objects.store import (
    Condition,
    Limits,
    Listed,
    ObjectStat,
    OpenUpload,
    Page,
    UploadPage,
)

SMALL = Limits(
    smallest_part=4,
    largest_part=64,
    most_parts=20,
    largest_put=1000,
    largest_copy=64,
    most_deletes=3,
)


class MemoryStore:
    def __init__(self, *, limits: Limits = SMALL, conditional: bool = True) -> None:
        self.limits = limits
        self.conditional = conditional
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.uploads: list[MemoryUpload] = []
        self.counted: Counter[str] = Counter()
        self.before: Callable[[str, str], Awaitable[None]] = _nothing
        """Awaited with verb and key in front of each call."""
        self.after: Callable[[str, str], Awaitable[None]] = _nothing
        self._versions = 0

    async def step(self, verb: str, key: str) -> None:
        self.counted[verb] += 1
        await trio.lowlevel.checkpoint()
        await self.before(verb, key)

    def _data(self, key: str) -> bytes:
        if key not in self.objects:
            raise NotFound(f"no '{key}'")
        return self.objects[key][0]

    def check(self, key: str, condition: Condition | None) -> None:
        if condition is None or not self.conditional:
            return
        there = self.objects.get(key)
        if condition.absent and there is not None:
            raise Conflict("it is there")
        if condition.etag is not None and there is None:
            raise NotFound("it is gone")
        if condition.etag is not None and there is not None and there[1] != condition.etag:
            raise Conflict("it is another one")

    def keep(self, key: str, data: bytes) -> str:
        self._versions += 1
        self.objects[key] = (data, f"v{self._versions}")
        return self.objects[key][1]

    async def get(self, key: str, *, limit: int) -> bytes:
        await self.step("get", key)
        return self._data(key)[:limit]

    async def get_into(self, key: str, offset: int, buffer: memoryview, *, etag: str = "") -> int:
        await self.step("get", key)
        data = self._data(key)
        if etag and self.objects[key][1] != etag:
            raise Conflict("replaced", code="ESTALE")
        piece = data[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    async def put(
        self, key: str, data: bytes | memoryview, *, condition: Condition | None = None
    ) -> str:
        await self.step("put", key)
        assert len(data) <= self.limits.largest_put
        self.check(key, condition)
        etag = self.keep(key, bytes(data))
        await self.after("put", key)
        return etag

    async def head(self, key: str) -> ObjectStat:
        await self.step("head", key)
        return ObjectStat(len(self._data(key)), time.time(), self.objects[key][1])

    async def list(self, prefix: str, *, deep: bool, token: str | None = None) -> Page:
        await self.step("list", prefix)
        found = [key for key in sorted(self.objects) if key.startswith(prefix)]
        assert deep
        assert token is None
        return Page([Listed(key, len(self._data(key)), 0.0) for key in found], (), None)

    async def delete(self, key: str, *, condition: Condition | None = None) -> None:
        await self.step("delete", key)
        self.check(key, condition)
        self.objects.pop(key, None)
        await self.after("delete", key)

    async def delete_many(self, keys: Sequence[str]) -> Sequence[ProxyError | None]:
        await self.step("delete_many", keys[0])
        assert len(keys) <= self.limits.most_deletes
        for key in keys:
            self.objects.pop(key, None)
        return [None] * len(keys)

    async def copy(self, source: str, target: str) -> None:
        await self.step("copy", target)
        data = self._data(source)
        if len(data) > self.limits.largest_copy:
            raise Refused("too large", code="EFBIG")
        self.keep(target, data)

    async def upload(self, key: str) -> MemoryUpload:
        await self.step("upload", key)
        self.uploads.append(MemoryUpload(self, key))
        return self.uploads[-1]

    async def open_uploads(
        self, prefix: str, *, token: tuple[str, str] | None = None
    ) -> UploadPage:
        await self.step("uploads", prefix)
        del token
        found = [each for each in self.uploads if each.open and each.key.startswith(prefix)]
        return UploadPage([OpenUpload(each.key, str(id(each)), 0.0) for each in found], None)

    async def abort_upload(self, key: str, upload_id: str) -> None:
        await self.step("abort", key)
        for each in self.uploads:
            if str(id(each)) == upload_id:
                each.open = False

    async def capabilities(self) -> Mapping[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"conditionalPut": self.conditional, "conditionalDelete": self.conditional}

    def requests(self) -> Mapping[str, int]:
        return self.counted

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class MemoryUpload:
    def __init__(self, store: MemoryStore, key: str) -> None:
        self.key = key
        self.parts: dict[int, bytes] = {}
        self.open = True
        self._store = store

    def _check(self, number: int, size: int) -> None:
        limits = self._store.limits
        assert self.open
        assert 1 <= number <= limits.most_parts, f"part {number}"
        assert size <= limits.largest_part

    async def send(self, number: int, data: bytes | memoryview) -> None:
        await self._store.step("part", self.key)
        self._check(number, len(data))
        self.parts[number] = bytes(data)

    async def copy(self, number: int, source: str, offset: int, length: int) -> None:
        await self._store.step("copy-part", self.key)
        self._check(number, length)
        assert length <= self._store.limits.largest_copy
        data = self._store.objects[source][0][offset : offset + length]
        assert len(data) == length
        self.parts[number] = data

    async def complete(self, *, condition: Condition | None = None) -> None:
        await self._store.step("complete", self.key)
        if not self.open:
            raise NotFound("no such upload", code="ENOUPLOAD")
        self._store.check(self.key, condition)
        numbers = sorted(self.parts)
        assert all(
            len(self.parts[number]) >= self._store.limits.smallest_part for number in numbers[:-1]
        )
        self.open = False
        self._store.keep(self.key, b"".join(self.parts[number] for number in numbers))
        await self._store.after("complete", self.key)

    async def abort(self) -> None:
        await self._store.step("abort", self.key)
        self.open = False


async def _nothing(_verb: str, _key: str) -> None:
    return None
