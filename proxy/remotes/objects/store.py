"""What an object store can do: flat keys, whole objects, uploads in parts.

Keys are UTF-8 without a leading ``/``, below the bucket (S3) or container (Azure).  All methods
raise the classes of :mod:`proxy.errors`: ``NotFound`` (``ENOENT`` for an object, ``ENOBUCKET``
for the bucket itself), ``Unauthorized`` (``EACCES``: credentials, clock, signature), ``Refused``
(what the store forbids, ``EPERM`` for an object under a retention), ``Conflict`` (``EEXIST`` when
a condition does not hold), ``Unreachable`` (network, 5xx, throttling: the same call may work
later).  The store's own code and status stand in the error's ``data``.

No method retries: that is one wrapper's work, which knows what may be repeated.  On cancel a
request ends at once; whether it took effect is then not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.errors import ProxyError


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one store, in bytes and numbers."""

    smallest_part: int
    largest_part: int
    most_parts: int
    largest_put: int
    """Larger objects must come in parts."""
    largest_copy: int
    """Larger objects must be copied in parts."""
    most_deletes: int
    """Keys in one :meth:`ObjectStore.delete_many`; 1 where the store has no such call."""


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """``etag`` is opaque: equal while the object is the same."""

    size: int
    mtime: float
    etag: str


@dataclass(frozen=True, slots=True)
class Listed:
    key: str
    size: int
    mtime: float


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a listing in the order of keys.  ``prefixes`` end in ``/``.

    ``next`` continues it and is ``None`` at the end: a page that only looks like the last one
    (truncated, without a way to go on) is an error, never an end.
    """

    objects: Sequence[Listed]
    prefixes: Sequence[str]
    next: str | None


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """An object in parts that was begun, and neither completed nor given up.

    ``initiated`` is seconds since the epoch by the store's clock.
    """

    key: str
    upload_id: str
    initiated: float


@dataclass(frozen=True, slots=True)
class UploadPage:
    """Part of a listing of uploads; ``next`` continues it and is ``None`` at the end."""

    uploads: Sequence[OpenUpload]
    next: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class Condition:
    """Of a put or a delete: the object is absent, or still the one with that ``etag``."""

    absent: bool = False
    etag: str | None = None


class Upload(Protocol):
    """An object in parts.  Parts may be sent in any order and several at once."""

    async def send(self, number: int, data: bytes | memoryview) -> None:
        """Part ``number``, from 1.  Sent again it replaces the former one."""
        ...

    async def copy(self, number: int, source: str, offset: int, length: int) -> None:
        """A part that is a range of the object ``source``, copied by the store."""
        ...

    async def complete(self, *, condition: Condition | None = None) -> None:
        """The object is there, whole and durable.  ``Corrupt`` if the store did not confirm it."""
        ...

    async def abort(self) -> None:
        """Nothing of it stays, nor costs anything.  No error when it is gone already."""
        ...


class ObjectStore(Protocol):
    """Safe for concurrent use by many tasks."""

    limits: Limits

    async def get(self, key: str, *, limit: int) -> bytes:
        """The whole object.  ``Corrupt`` when it is larger than ``limit`` bytes."""
        ...

    async def get_into(self, key: str, offset: int, buffer: memoryview, *, etag: str = "") -> int:
        """Fill ``buffer`` from ``offset``; fewer bytes only past the end (0 at or behind it).

        ``Conflict`` (``ESTALE``) when ``etag`` is given and the object is no longer that one.
        """
        ...

    async def put(
        self, key: str, data: bytes | memoryview, *, condition: Condition | None = None
    ) -> str:
        """Make or replace an object; returns its etag.  Durable on return."""
        ...

    async def head(self, key: str) -> ObjectStat: ...

    async def list(self, prefix: str, *, deep: bool, token: str | None = None) -> Page:
        """Keys that begin with ``prefix``.  Unless ``deep``, what follows the next ``/`` is one
        of ``prefixes``."""
        ...

    async def delete(self, key: str, *, condition: Condition | None = None) -> None:
        """No error when it does not exist."""
        ...

    async def delete_many(self, keys: Sequence[str]) -> Sequence[ProxyError | None]:
        """At most :attr:`Limits.most_deletes` keys; the outcome of each, in their order."""
        ...

    async def copy(self, source: str, target: str) -> None:
        """Within the bucket, by the store, at most :attr:`Limits.largest_copy` bytes.

        Returns when the copy is there and durable.
        """
        ...

    async def upload(self, key: str) -> Upload:
        """Begin an object in parts."""
        ...

    async def open_uploads(
        self, prefix: str, *, token: tuple[str, str] | None = None
    ) -> UploadPage:
        """Uploads of keys that begin with ``prefix``, in the order of keys.

        Those that this process has under way are not among them.  Empty where the store does not
        tell.
        """
        ...

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """As :meth:`Upload.abort`, of one that :meth:`open_uploads` told of."""
        ...

    async def capabilities(self) -> Mapping[str, Any]:
        """What this endpoint can do, found out once by trying; JSON values for ``remote.test``.

        ``conditionalPut`` says whether :class:`Condition` holds for puts and completes (a store
        may ignore the header without a word), ``conditionalDelete`` for deletes, ``objectLock``
        whether objects are immutable; others as the store likes.
        """
        ...

    def requests(self) -> Mapping[str, int]:
        """How many requests were sent, by verb (``GET``, ``PUT``, ``HEAD``, ``LIST``, …)."""
        ...

    async def aclose(self) -> None: ...
