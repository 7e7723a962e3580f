"""Writing a metadata backup: its data, then the ``metadata.json`` that makes it count."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from proxy.errors import Conflict, Corrupt, NotFound, ProxyError
from proxy.repository.completion import free_date
from proxy.repository.metadata_backup_paths import METADATA_NAME
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from proxy.remotes.interface import FileWriter, Lock, Remote

_UNDO_SECONDS = 60
_METADATA_SECONDS = 120


@contextlib.asynccontextmanager
async def lock_metadata(
    remote: Remote, directory: str, *, owner: str, wait: float
) -> AsyncIterator[Lock]:
    """Hold one schedule's directory of one pool, or of the configuration.

    Xen Orchestra takes no lock here: this one is between daemons of this kind.
    """
    await remote.mktree(directory)
    async with remote.lock(directory, owner=owner, wait=wait) as lock:
        yield lock


class MetadataBackupWriter:
    """One backup being written; made by :func:`open_metadata_backup`.  Not for concurrent use."""

    def __init__(self, remote: Remote, path: str, data: str) -> None:
        self._remote = remote
        self._path = path
        self._data = f"{path}/{data}"
        self._file: FileWriter | None = None
        self._named = False
        self._done = False
        self.size = 0
        """Bytes written so far, before encryption."""

    @property
    def name(self) -> str:
        """Of the backup's directory: a date."""
        return self._path.rpartition("/")[2]

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """The data file is open for the block; what is not committed goes with it."""
        async with self._remote.create(self._data, exclusive=True) as self._file:
            yield

    async def write(self, data: bytes | memoryview) -> None:
        """Append to the data.  The buffer may be reused when this returns."""
        assert self._file is not None, "not open"
        await self._file.write(data)
        self.size += len(data)

    async def commit(self, metadata: Mapping[str, Any]) -> None:
        """Make it a backup.

        After an error or a cancel there is either no trace or, when the metadata had been
        written, a complete backup.  From the writing of the metadata on a cancel waits for the
        outcome, and strikes at the caller's next checkpoint.
        """
        assert self._file is not None, "not open"
        content = msgspec.json.format(msgspec.json.encode(metadata), indent=2)
        self._named = True  # before the call: it may have an effect and still fail
        try:
            await self._file.commit()
        except Conflict:
            self._named = False  # the name is somebody else's, and so is what it names
            raise
        await self._check_size()
        path = f"{self._path}/{METADATA_NAME}"
        await trio.lowlevel.checkpoint_if_cancelled()
        with undo_within(f"writing {path}", _METADATA_SECONDS):
            try:
                await self._remote.write_file(path, content, exclusive=True)
            except Conflict:
                if await self._remote.read_file(path) != content:  # else an answer was lost
                    raise
        self._done = True

    async def _check_size(self) -> None:
        """Whether the storage holds what it said it wrote; encryption changes the size."""
        if self._remote.is_encrypted:
            return
        size = (await self._remote.stat(self._data)).size
        if size != self.size:
            raise Corrupt(
                f"'{self._data}' has {size} bytes after {self.size} were written",
                data={"path": self._data, "actual": size, "expected": self.size},
            )

    async def undo(self) -> None:
        """Remove the directory unless there is, or may be, metadata in it.

        Shielded, bounded; trouble is told, never raised.
        """
        if self._done:
            return
        try:
            with undo_within(f"removing {self._path}", _UNDO_SECONDS):
                try:
                    await self._remote.stat(f"{self._path}/{METADATA_NAME}")
                except NotFound:
                    if self._named:
                        await self._remote.unlink(self._data)
                    await self._remote.rmdir(self._path)
        except ProxyError as error:
            tell_trouble("an unfinished metadata backup is left", error, path=self._path)


@contextlib.asynccontextmanager
async def open_metadata_backup(
    remote: Remote, directory: str, timestamp_ms: float, data: str
) -> AsyncIterator[MetadataBackupWriter]:
    """Write a backup into ``directory``, whose lock the caller holds.

    ``timestamp_ms`` names it, or the first free second after it.  ``data`` is the name of the
    data file.  What a crash right after each step leaves:

    1. the directory, and bytes in ``.<ms>.<data>.tmp``: nothing that a listing shows;
    2. fsync and rename to ``<data>``: the same;
    3. ``metadata.json``, atomic, exclusive, durable: *from here on it is a backup*.

    What is left by 1 and 2 is removed by a later run (:mod:`proxy.repository.metadata_pruning`).
    Leaving without :meth:`MetadataBackupWriter.commit`, an error and a cancel before step 3 ends
    remove it at once.
    """
    await remote.mktree(directory)
    date = await free_date(remote, directory, timestamp_ms)
    writer = MetadataBackupWriter(remote, f"{directory}/{date}", data)
    try:
        await remote.mktree(f"{directory}/{date}")
        async with writer.writing():
            yield writer
    finally:
        await writer.undo()
