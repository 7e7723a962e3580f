"""Directories as prefixes: what stands in them, page by page."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from proxy.errors import NotFound, Unreachable
from proxy.remotes.interface import Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.remotes.objects.store import Listed, ObjectStore, OpenUpload, Page


class Keys:
    """Keys of what is below ``prefix``, which has no slash at its ends (``""``: the bucket)."""

    def __init__(self, prefix: str) -> None:
        self._head = f"{prefix}/" if prefix else ""

    def of(self, path: str) -> str:
        """Of the file at the normalised ``path``."""
        return self._head + path

    def below(self, path: str) -> str:
        """What the keys of everything in the directory ``path`` begin with."""
        return f"{self._head}{path}/" if path else self._head

    def path_of(self, key: str) -> str:
        return key[len(self._head) :]


class pages:  # noqa: N801 (used as a function; a generator would need closing when left early)
    """Every page of a listing.  ``Unreachable`` when it would go in circles."""

    def __init__(self, store: ObjectStore, prefix: str, *, deep: bool) -> None:
        self._store = store
        self._prefix = prefix
        self._deep = deep
        self._token: str | None = None
        self._seen: set[str | None] = set()
        self._ended = False

    def __aiter__(self) -> pages:
        return self

    async def __anext__(self) -> Page:
        if self._ended:
            raise StopAsyncIteration
        if self._token in self._seen:
            raise _circles(self._prefix)
        self._seen.add(self._token)
        page = await self._store.list(self._prefix, deep=self._deep, token=self._token)
        self._token = page.next
        self._ended = page.next is None
        return page


async def open_uploads(store: ObjectStore, prefix: str) -> Sequence[OpenUpload]:
    """All that the store tells; never a part of them."""
    found: deque[OpenUpload] = deque()
    token: tuple[str, str] | None = None
    seen: set[tuple[str, str] | None] = set()
    while token not in seen:
        seen.add(token)
        page = await store.open_uploads(prefix, token=token)
        found.extend(page.uploads)
        if page.next is None:
            return tuple(found)
        token = page.next
    raise _circles(prefix)


async def entries(store: ObjectStore, keys: Keys, path: str) -> list[Entry]:
    """What :meth:`proxy.remotes.interface.Remote.list` answers.

    A key that ends in ``/``, as consoles make them for empty directories, is the directory
    itself.  Names that no path can have (an empty one, dots) cannot be reached and are left out.
    """
    prefix = keys.below(path)
    found: set[tuple[str, bool]] = set()
    exists = not path
    async for page in pages(store, prefix, deep=False):
        exists = exists or bool(page.objects or page.prefixes)
        found.update((each.key[len(prefix) :], False) for each in page.objects)
        found.update((each[len(prefix) :].rstrip("/"), True) for each in page.prefixes)
    if not exists:
        raise missing("list", path)
    return [Entry(name, is_dir) for name, is_dir in sorted(found) if name not in ("", ".", "..")]


async def first_below(store: ObjectStore, keys: Keys, path: str) -> Listed | None:
    """Any object in the directory ``path`` or below; ``None`` when it holds nothing."""
    async for page in pages(store, keys.below(path), deep=True):
        if page.objects:
            return page.objects[0]
    return None


def _circles(prefix: str) -> Unreachable:
    return Unreachable(
        f"EPROTO: the store's listing of '{prefix}' goes in circles",
        code="EPROTO",
        data={"path": prefix},
    )


def missing(doing: str, path: str) -> NotFound:
    return NotFound(
        f"ENOENT: no such file or directory, {doing} '{path}'", code="ENOENT", data={"path": path}
    )
