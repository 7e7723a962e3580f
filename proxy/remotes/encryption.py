"""A remote whose files are encrypted, around any other.

Encrypted is every file but those that :func:`is_plain` names, which Xen Orchestra reads without
the key: ``encryption.json``, ``immutability.json``, ``*.checksum`` (of the bytes as stored) and
``*.test`` at the root.  Names, directories, times, and sizes but for a few bytes, are visible to
whoever sees the storage.  Locks and their records are made by the storage itself, below us.

**Sizes** are those of the content, everywhere: ``stat``, ``walk``, ``FileReader.size``, limits.
An authenticated file is 28 bytes longer than its content.  With aes-256-cbc only the file's end
tells, so that each size costs a read.

**Reading.**  A file has one tag, at its end.  ``read_file`` and ``read_files`` give nothing that
was not authenticated.  A reader gives pieces as they come, and its *last* piece only once the
tag is right: who consumes a file to its end has all of it authenticated, and who got
``Corrupt`` instead of the end throws away what it made.  ``read_at`` and ``read_into_at`` are
``Refused`` (``ENOTSUP``), as by Xen Orchestra: both ciphers could seek, but what they found
there would be whatever somebody put there.

**Writing** in place is ``Refused`` (``ENOTSUP``), so that disks are VHD directories here,
whatever the URL says: a VHD file could be written and never read again.

Until its commit, what is at a writer's temporary path lacks its tag and cannot be read.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

import trio

from proxy.errors import Corrupt, NotFound, ProxyError, Refused
from proxy.formats.encrypted import MOST_OVERHEAD, TAG_SIZE, Decryption, FileCipher
from proxy.remotes import paths
from proxy.remotes.encrypting import UNIT, EncryptedWriter, Sealer, naming, run, sealed_by
from proxy.remotes.wrapper import Wrapper, may_write_later
from proxy.runtime.background import background

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.formats.encrypted import Algorithm
    from proxy.remotes.interface import (
        Batch,
        FileEditor,
        FileReader,
        FileStat,
        FileWriter,
        Remote,
    )

T = TypeVar("T")

DESCRIPTION: Final = "encryption.json"
PROBE: Final = "metadata.json"
_INTERRUPTED: Final = "reading it was interrupted"


def is_plain(path: str) -> bool:
    """Whether the file at ``path`` is stored as it is."""
    normal = paths.normalise(path)
    name = paths.name(normal)
    if name.endswith(".checksum"):
        return True
    return name == normal and (
        name in (DESCRIPTION, "immutability.json")
        or name.endswith(".test")
        or name.startswith(".keeper_")
    )


def sealer_of(remote: Remote, size: int) -> Sealer | None:
    """What encrypts contents of up to ``size`` bytes for ``remote``, whatever is around it, before
    its batch gets them; ``None``: it is not encrypted."""
    while isinstance(remote, Wrapper):
        if isinstance(remote, Encrypted):
            return Sealer(remote.cipher, size, reuses=not may_write_later(remote))
        remote = remote.inner
    return None


def algorithm_of(remote: Remote) -> Algorithm | None:
    """By which ``remote`` is encrypted, whatever is around it; ``None``: it is not."""
    while isinstance(remote, Wrapper):
        if isinstance(remote, Encrypted):
            return remote.cipher.algorithm
        remote = remote.inner
    return None


class Encrypted(Wrapper):
    """See :class:`proxy.remotes.interface.Remote` and the module's text."""

    def __init__(self, inner: Remote, cipher: FileCipher) -> None:
        super().__init__(inner)
        self.cipher = cipher
        self.is_encrypted = True
        self.use_vhd_directory = True

    # -- whole files ---------------------------------------------------------------------------

    async def read_file(self, path: str, *, limit: int = 64 * 1024 * 1024) -> bytes:
        if is_plain(path):
            return await self.inner.read_file(path, limit=limit)
        stored: bytes | ProxyError
        try:
            stored = await self.inner.read_file(path, limit=limit + MOST_OVERHEAD)
        except Corrupt as error:
            stored = error
        size = len(stored) if isinstance(stored, bytes) else 0
        return await run(size, self._decrypt_one, path, stored, limit)

    async def read_files(
        self, paths: Sequence[str], *, limit: int = 16 * 1024 * 1024
    ) -> Sequence[bytes | ProxyError]:
        stored = await self.inner.read_files(paths, limit=limit + MOST_OVERHEAD)
        size = sum(len(each) for each in stored if isinstance(each, bytes))
        return await run(size, self._decrypt_all, paths, stored, limit)

    def _decrypt_all(
        self, names: Sequence[str], stored: Sequence[bytes | ProxyError], limit: int
    ) -> Sequence[bytes | ProxyError]:
        contents: deque[bytes | ProxyError] = deque()  # ``list`` is a method here
        for path, each in zip(names, stored, strict=True):
            try:
                contents.append(self._decrypt_one(path, each, limit))
            except ProxyError as error:
                contents.append(error)
        return tuple(contents)

    def _decrypt_one(self, path: str, stored: bytes | ProxyError, limit: int) -> bytes:
        if isinstance(stored, ProxyError):
            is_limit = isinstance(stored, Corrupt) and "limit" in stored.data
            raise _too_large(path, limit) if is_limit else stored
        content = stored
        if not is_plain(path):
            with naming(path):
                content = self.cipher.decrypt(stored)
        if len(content) > limit:
            raise _too_large(path, limit)
        return content

    async def write_file(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        if not is_plain(path):
            data = bytes(await self.encrypted(data))
        await self.inner.write_file(path, data, exclusive=exclusive)

    async def encrypted(self, data: bytes | memoryview) -> memoryview:
        """A whole file as stored."""
        return await run(len(data), self.cipher.encrypt, data)

    # -- streams -------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _create(self, path: str, *, exclusive: bool) -> AsyncIterator[FileWriter]:
        async with self.inner.create(path, exclusive=exclusive) as file:
            if is_plain(path):
                yield file
                return
            writer = EncryptedWriter(file, path, self.cipher)
            async with background() as nursery:
                nursery.start_soon(writer.work)
                yield writer

    @contextlib.asynccontextmanager
    async def _open_read(self, path: str) -> AsyncIterator[FileReader]:
        async with self.inner.open_read(path) as file:
            if is_plain(path):
                yield file
                return
            with naming(path):
                size = self.cipher.plain_size(file.size)
                if not self.cipher.algorithm.is_authenticated:
                    size += 1 - await self._padding(file)
            kind = _Reader if self.cipher.algorithm.is_authenticated else _PaddedReader
            yield kind(file, path, self.cipher, size)

    async def _padding(self, file: FileReader) -> int:
        return self.cipher.padding_of(await file.read_at(file.size - 32, 32))

    def edit(self, path: str) -> AbstractAsyncContextManager[FileEditor]:
        raise Refused(
            f"'{path}' cannot be changed in place: on an encrypted remote every file is written"
            " as a whole, and disks are stored as VHD directories",
            code="ENOTSUP",
            data={"path": path},
        )

    @contextlib.asynccontextmanager
    async def _batch(self) -> AsyncIterator[Batch]:
        async with self.inner.batch() as inner:
            yield _Batch(self, inner)

    # -- sizes ---------------------------------------------------------------------------------

    async def stat(self, path: str) -> FileStat:
        return await self._as_content(path, await self.inner.stat(path))

    async def walk(self, path: str) -> AsyncIterator[tuple[str, FileStat]]:
        async for name, status in self.inner.walk(path):
            try:
                content = await self._as_content(name, status)
            except NotFound:
                continue  # it has gone since it was listed
            yield name, content

    async def _as_content(self, path: str, status: FileStat) -> FileStat:
        """The size of the content; 0 when it is no file that could have any."""
        if status.is_dir or is_plain(path):
            return status
        try:
            size = self.cipher.plain_size(status.size)
            if not self.cipher.algorithm.is_authenticated:
                async with self.inner.open_read(path) as file:
                    size += 1 - await self._padding(file)
        except Corrupt:
            size = 0
        return replace(status, size=size)


def _too_large(path: str, limit: int) -> Corrupt:
    return Corrupt(
        f"'{path}' is larger than the {limit} bytes that are read at once",
        data={"path": path, "limit": limit},
    )


class _Batch:
    def __init__(self, owner: Encrypted, inner: Batch) -> None:
        self._owner = owner
        self._inner = inner

    async def write(self, path: str, data: bytes | memoryview) -> None:
        if (sealed := sealed_by(data)) is not None:
            assert sealed is self._owner.cipher, "of another remote"
            assert not is_plain(path), "read by who has no key"
        elif not is_plain(path):
            data = await self._owner.encrypted(data)
        await self._inner.write(path, data)

    async def commit(self) -> None:
        await self._inner.commit()


class _SequentialReader:
    """From the first byte to the last; one task at a time."""

    def __init__(self, inner: FileReader, path: str, cipher: FileCipher, size: int) -> None:
        self.size = size
        self._inner = inner
        self._path = path
        self._cipher = cipher
        self._position = 0
        self._decryption: Decryption | None = None
        self._failure: Corrupt | None = None

    async def read_at(self, offset: int, length: int) -> bytes:
        del offset, length
        self._refuse()

    async def read_into_at(self, offset: int, buffer: memoryview) -> int:
        del offset, buffer
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise Refused(
            f"'{self._path}' cannot be read in parts: on an encrypted remote only a whole file"
            " can be authenticated",
            code="ENOTSUP",
            data={"path": self._path},
        )

    async def _begun(self) -> Decryption:
        if self._failure is not None:
            raise self._failure
        if self._decryption is None:
            head = bytearray(self._cipher.algorithm.iv_size)
            await self._fill(memoryview(head))
            self._decryption = self._cipher.decryption(bytes(head))
        return self._decryption

    async def _fill(self, buffer: memoryview) -> None:
        """An error of the storage leaves everything as it was: it can be called again."""
        try:
            count = await self._inner.read_into(buffer)
        except trio.Cancelled:
            self._failed(_INTERRUPTED)  # it may have read or not
            raise
        if count < len(buffer):
            raise self._failed(
                f"it ended early: it has {self._inner.size} bytes, or had when it was opened"
            )

    def _failed(self, message: str) -> Corrupt:
        """For good: what follows in the file belongs to a position that was lost."""
        self._failure = Corrupt(
            f"'{self._path}': {message}", data={"what": "encryption", "path": self._path}
        )
        return self._failure

    @contextlib.contextmanager
    def _advancing(self) -> Iterator[None]:
        """Around what must not be done half: bytes taken from the file and not decrypted."""
        try:
            yield
        except Corrupt as error:
            raise self._failed(error.message) from error
        except BaseException:
            self._failed(_INTERRUPTED)
            raise


class _Reader(_SequentialReader):
    """Decrypts in the caller's buffer, and gives the last piece when the tag is right."""

    def __init__(self, inner: FileReader, path: str, cipher: FileCipher, size: int) -> None:
        super().__init__(inner, path, cipher, size)
        self._is_authentic = False

    async def read_into(self, buffer: memoryview) -> int:
        decryption = await self._begun()
        piece = buffer[: self.size - self._position]
        if self._position + len(piece) < self.size:
            await self._fill(piece)
            with self._advancing():
                await run(len(piece), decryption.update_in_place, piece)
        elif not self._is_authentic:
            last = memoryview(bytearray(len(piece) + TAG_SIZE))
            await self._fill(last)
            with self._advancing():
                await run(len(piece), self._finish, decryption, last)
            piece[:] = last[: len(piece)]
            self._is_authentic = True
        self._position += len(piece)
        return len(piece)

    def _finish(self, decryption: Decryption, last: memoryview) -> None:
        decryption.update_in_place(last[:-TAG_SIZE])
        decryption.finish(bytes(last[-TAG_SIZE:]))


class _PaddedReader(_SequentialReader):
    """aes-256-cbc, whose content lags behind what is read."""

    def __init__(self, inner: FileReader, path: str, cipher: FileCipher, size: int) -> None:
        super().__init__(inner, path, cipher, size)
        self._ready = b""
        self._left = inner.size - cipher.algorithm.iv_size

    async def read_into(self, buffer: memoryview) -> int:
        decryption = await self._begun()
        wanted = min(len(buffer), self.size - self._position)
        while len(self._ready) < wanted:
            unit = memoryview(bytearray(min(self._left, UNIT)))
            await self._fill(unit)
            with self._advancing():
                self._ready += await run(len(unit), decryption.update, unit)
                self._left -= len(unit)
                if self._left == 0:
                    self._ready += decryption.finish(b"")
        buffer[:wanted] = self._ready[:wanted]
        self._ready = self._ready[wanted:]
        self._position += wanted
        return wanted
