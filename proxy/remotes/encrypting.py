"""Writing encrypted files: the processor encrypts one piece while the storage takes the one before.

Work on more than :data:`INLINE` bytes is done in threads, at most :data:`UNIT` bytes at once, into
memory that is used again: fresh memory for each piece costs as much as the cipher itself.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from proxy.errors import Corrupt, Refused
from proxy.formats.encrypted import MOST_OVERHEAD
from proxy.runtime.threads import Work, in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from proxy.formats.encrypted import FileCipher
    from proxy.remotes.interface import FileWriter

T = TypeVar("T")

UNIT: Final = 2 * 1024 * 1024
"""Bytes that are encrypted or decrypted at once."""
INLINE: Final = 64 * 1024
"""Bytes up to which a thread would cost more than the cipher: at most 60 µs."""
_WORTH_A_WRITE: Final = 256 * 1024
"""Bytes that are collected before the storage gets them."""
_BUFFERS: Final = 2
_SPARE: Final = 8


async def run(size: int, function: Callable[..., T], *args: object) -> T:
    """``function(*args)``, in a thread when it has ``size`` bytes worth it."""
    if size <= INLINE:
        await trio.lowlevel.checkpoint()
        return function(*args)
    return await in_thread(Work.CPU, function, *args)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Say of which file the cipher complains."""
    try:
        yield
    except (Corrupt, Refused) as error:
        kind = type(error)
        data = {**error.data, "path": path}
        raise kind(f"'{path}': {error.message}", code=error.code, data=data) from error


class Sealed(bytearray):
    """Memory for a whole file as stored, and what encrypted it."""

    def __init__(self, size: int, cipher: FileCipher) -> None:
        super().__init__(size)
        self.cipher = cipher


class Sealer:
    """Encrypts whole files into memory that is used again; thread-safe.

    For those who prepare the content in a thread anyway: the encryption is then done there, while
    the content is still in the processor's cache.  A batch of the remote takes what
    :meth:`seal` gives as it is.
    """

    def __init__(self, cipher: FileCipher, size: int, *, reuses: bool = True) -> None:
        """``size``: bytes of the longest content for which memory is kept, if it ``reuses`` it."""
        self._cipher = cipher
        self._spare = _SPARE if reuses else 0
        self._size = size + MOST_OVERHEAD
        self._free: deque[Sealed] = deque()

    def seal(self, pieces: Sequence[bytes | memoryview]) -> memoryview:
        """The file whose content is ``pieces``.  Blocking: about 1 ms for 2 MiB."""
        size = sum(map(len, pieces)) + MOST_OVERHEAD
        memory = self._memory(size)
        return memoryview(memory).toreadonly()[: self._cipher.encrypt_into(pieces, memory)]

    def _memory(self, size: int) -> Sealed:
        if size <= self._size:
            with contextlib.suppress(IndexError):
                return self._free.pop()
        return Sealed(max(size, self._size), self._cipher)

    def give_back(self, sealed: memoryview) -> None:
        """Its memory may be used again: only when the storage has certainly done with it, so not
        after an error or a cancel."""
        memory = sealed.obj
        assert isinstance(memory, Sealed), "not from here"
        if len(memory) == self._size and len(self._free) < self._spare:
            self._free.append(memory)


def sealed_by(data: bytes | memoryview) -> FileCipher | None:
    """What encrypted ``data``, when a :class:`Sealer` did."""
    if isinstance(data, memoryview) and isinstance(data.obj, Sealed):
        return data.obj.cipher
    return None


class EncryptedWriter:
    """See :class:`proxy.remotes.interface.FileWriter`.

    :meth:`work` runs beside it and gives the storage what is encrypted, in order.  An error of the
    storage is raised by a later call than the one that it is about, :meth:`commit` at the latest.
    """

    def __init__(self, inner: FileWriter, path: str, cipher: FileCipher) -> None:
        self.temporary_path = inner.temporary_path
        self._inner = inner
        self._path = path
        self._encryption = cipher.encryption()
        self._head = self._encryption.head
        self._memory: memoryview | None = None
        """What is filled now, ``_filled`` bytes of it."""
        self._filled = 0
        self._made = 0
        self._free: deque[memoryview] = deque()
        self._ready: deque[tuple[memoryview, int]] = deque()
        """Full ones and their sizes; the first of them may be under way to the storage."""
        self._news = trio.Event()
        self._progress = trio.Event()
        self._error: Exception | None = None
        self._is_whole = True

    async def write(self, data: bytes | memoryview) -> None:
        self._begin()
        view = memoryview(data).cast("B")
        while view:
            memory = await self._room()
            unit = view[: min(UNIT, len(memory) - self._filled - MOST_OVERHEAD)]
            with naming(self._path):
                self._filled = await run(len(unit), self._encrypt, unit, memory, self._filled)
            view = view[len(unit) :]
            if self._filled >= _WORTH_A_WRITE:
                self._hand_over(memory)
        self._is_whole = True

    def _encrypt(self, data: memoryview, memory: memoryview, start: int) -> int:
        if self._head:
            memory[start : start + len(self._head)] = self._head
            start += len(self._head)
            self._head = b""
        return start + self._encryption.update_into(data, memory[start:])

    async def commit(self) -> None:
        self._begin()
        memory = await self._room()
        tail = self._head + self._encryption.finish()
        memory[self._filled : self._filled + len(tail)] = tail
        self._filled += len(tail)
        self._hand_over(memory)
        while self._ready:
            await self._progressed()
        self._raise_error()
        await self._inner.commit()

    async def _room(self) -> memoryview:
        """Memory with room for more; waits for the storage when all of it is full."""
        self._raise_error()
        if self._memory is None and not self._free and self._made < _BUFFERS:
            self._made += 1
            self._free.append(memoryview(bytearray(UNIT + 2 * MOST_OVERHEAD)))
        while self._memory is None:
            if self._free:
                self._memory = self._free.popleft()
            else:
                await self._progressed()
                self._raise_error()
        return self._memory

    async def _progressed(self) -> None:
        self._progress = trio.Event()
        await self._progress.wait()

    def _hand_over(self, memory: memoryview) -> None:
        self._ready.append((memory, self._filled))
        self._memory, self._filled = None, 0
        self._news.set()

    async def work(self) -> None:
        """Give the storage what is full, until cancelled."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            while self._ready:
                await self._write_first()

    async def _write_first(self) -> None:
        memory, filled = self._ready[0]
        try:
            await self._inner.write(memory[:filled])
        except Exception as error:  # noqa: BLE001 (told by the next call)
            self._error = error
            self._ready.clear()
        else:
            self._ready.popleft()
            self._free.append(memory)
        self._progress.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _begin(self) -> None:
        """What failed or was cancelled half-way leaves a hole: there is no way on from there."""
        if not self._is_whole:
            raise Refused(
                f"'{self._path}' cannot be completed: writing to it failed before, or it is"
                " complete already",
                code="EBADF",
                data={"path": self._path},
            )
        self._is_whole = False
