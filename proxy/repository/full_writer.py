"""Writing a full backup: an ``.xva``, its checksum, and the metadata that makes it count."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import structlog
import trio

from proxy.errors import Conflict, Corrupt, NotFound, ProxyError
from proxy.repository.cache import refresh_cache
from proxy.repository.metadata import LIMIT, Backup, decode_backup, encode_full
from proxy.repository.paths import DATE_NAME, date_name, vm_directory
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from proxy.remotes.interface import FileWriter, Remote

_log = structlog.get_logger(__name__)

_UNDO_SECONDS = 60
_METADATA_SECONDS = 120
_FREE_SECONDS = 3600
"""How far a taken name is moved before giving up: nobody writes 3,600 backups at once."""


class FullBackupWriter:
    """One full backup being written; made by :func:`open_full_backup`.

    Not for concurrent use.
    """

    def __init__(
        self,
        remote: Remote,
        directory: str,
        date: str,
        file: FileWriter,
        validator: Callable[[str, int], Awaitable[None]] | None,
    ) -> None:
        self._remote = remote
        self._file = file
        self._validator = validator
        self.vm_uuid = directory.rpartition("/")[2]
        self.id = f"{directory}/{date}.json"
        """The id of the backup to be, with a leading slash."""
        self.xva_name = f"{date}.xva"
        self._xva = f"{directory}/{date}.xva"
        self._checksum = f"{directory}/{date}.xva.checksum"
        self.size = 0
        """Bytes written so far, before encryption."""
        self._named = False
        self._content: bytes | None = None
        self._complete = False

    async def write(self, data: bytes | memoryview) -> None:
        """Append to the ``.xva``.  The buffer may be reused when this returns."""
        await self._file.write(data)
        self.size += len(data)

    async def commit(self, metadata: Mapping[str, Any], checksum: bytes) -> Backup:
        """Make it a backup; returns it as a listing would.

        ``metadata``: see ``metadata.encode_full``; ``xva`` and ``size`` are filled in here.
        ``checksum`` is the MD5 digest of the bytes written, not stored on an encrypted
        remote, where it would be of the wrong bytes.

        After an error or a cancel there is either no trace or, when the metadata had been
        written, a complete backup.  From the writing of the metadata on, a cancel waits for
        the outcome: it then returns normally and the cancel strikes at the caller's next
        checkpoint.
        """
        self._content = encode_full(metadata, xva=self.xva_name, size=self.size)
        backup = decode_backup(self._content, self.id)
        if self._validator is not None:
            await self._validator(self._file.temporary_path, self.size)
        self._named = True  # before the call: it may have an effect and still fail
        try:
            await self._file.commit()
        except Conflict:
            self._named = False  # the name is somebody else's, and so is what it names
            raise
        await self._check_size()
        if not self._remote.is_encrypted:
            await self._remote.write_file(self._checksum, b"$1$$" + checksum.hex().encode())
        await trio.lowlevel.checkpoint_if_cancelled()
        with undo_within(f"writing {self.id}", _METADATA_SECONDS):
            try:
                await self._remote.write_file(self.id, self._content, exclusive=True)
            except Conflict:
                if not await self._is_there():
                    raise
        self._complete = True
        with undo_within(f"the listing cache of {self.vm_uuid}", _UNDO_SECONDS):
            await self._tell_cache()
        return backup

    async def _check_size(self) -> None:
        """Whether the storage holds what it said it wrote; encryption changes the size."""
        if self._remote.is_encrypted:
            return
        size = (await self._remote.stat(self._xva)).size
        if size != self.size:
            raise Corrupt(
                f"'{self._xva}' has {size} bytes after {self.size} were written",
                data={"path": self._xva, "actual": size, "expected": self.size},
            )

    async def _is_there(self) -> bool:
        """Whether the metadata on the remote is ours, byte for byte."""
        try:
            return await self._remote.read_file(self.id, limit=LIMIT) == self._content
        except NotFound:
            return False

    async def _tell_cache(self) -> None:
        assert self._content is not None
        try:
            await refresh_cache(self._remote, self.vm_uuid, {self.id: self._content})
        except ProxyError as error:
            _log.warning("the listing cache is not up to date", path=self.id, error=error.message)

    async def undo(self) -> None:
        """Remove what carries a final name, unless metadata says that it is a backup.

        When it cannot be told whether the metadata exists, everything stays: a clean that
        can read the directory decides.
        """
        if self._complete or not self._named:
            return
        try:
            with undo_within(f"removing {self._xva}", _UNDO_SECONDS):
                await self._remove_data()
        except ProxyError as error:
            # What brought us here is the news; the clean finds what is left.
            tell_trouble("an unfinished backup is left", error, path=self._xva)

    async def _remove_data(self) -> None:
        try:
            await self._remote.stat(self.id)
        except NotFound:
            await self._remote.unlink(self._checksum)
            await self._remote.unlink(self._xva)


@contextlib.asynccontextmanager
async def open_full_backup(
    remote: Remote,
    vm_uuid: str,
    timestamp_ms: float,
    *,
    exclusive: bool = True,
    validator: Callable[[str, int], Awaitable[None]] | None = None,
) -> AsyncIterator[FullBackupWriter]:
    """Write a full backup of ``vm_uuid``; the caller holds the lock of the VM directory.

    ``exclusive``: when anything of the same second exists already, the next free second
    names the files, and nothing is overwritten; the ``timestamp`` inside the metadata is
    the caller's.  Otherwise the name is exactly ``timestamp_ms`` (a mirror keeps its
    source's): data without metadata, as a crash leaves it, is replaced, and a complete
    backup of that name is a ``Conflict``.

    ``validator(path, size)`` runs before the data gets its final name and raises to refuse
    it; ``path`` is where the bytes are at that moment.

    The order, and what a crash right after each step leaves:

    1. bytes into ``.<ms>.<TS>.xva``: a file that no listing shows; the clean removes it.
       (An immutable remote writes to the final name: as 2.)
    2. fsync and rename to ``<TS>.xva``: data without metadata; the clean removes it.
    3. ``<TS>.xva.checksum``: the same.
    4. ``<TS>.json``, atomic, exclusive, durable: *from here on it is a backup*.
    5. ``cache.json.gz``: before it, the cache lacks an entry; the next listing adds it.

    Leaving without :meth:`FullBackupWriter.commit`, an error and a cancel before step 4 ends
    remove everything written, data last (1 is the storage's own undo).
    """
    directory = vm_directory(vm_uuid)
    await remote.mktree(directory)
    date = await _free_date(remote, directory, timestamp_ms, exclusive=exclusive)
    async with remote.create(f"{directory}/{date}.xva", exclusive=exclusive) as file:
        writer = FullBackupWriter(remote, directory, date, file, validator)
        try:
            yield writer
        finally:
            await writer.undo()


async def _free_date(
    remote: Remote, directory: str, timestamp_ms: float, *, exclusive: bool
) -> str:
    names = [entry.name for entry in await remote.list(directory)]
    date = date_name(timestamp_ms)
    if not exclusive:
        if f"{date}.json" in names:
            raise Conflict(f"the backup '{directory}/{date}.json' exists already")
        return date
    taken = {match[0] for name in names for match in DATE_NAME.finditer(name)}
    for seconds in range(_FREE_SECONDS):
        date = date_name(timestamp_ms + seconds * 1000)
        # Also a temporary file and an orphan take a name: their writer may still live where
        # the storage has no locks.
        if date not in taken:
            return date
    raise Conflict(f"no free name for a backup in '{directory}' from {date} on")
