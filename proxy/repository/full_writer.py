"""Writing a full backup: an ``.xva``, its checksum, and the metadata that makes it count."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from proxy.errors import Conflict, Corrupt, NotFound
from proxy.remotes import paths
from proxy.repository.completion import Completion, free_date
from proxy.repository.metadata import encode_full
from proxy.repository.paths import date_name, vm_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from proxy.remotes.interface import FileWriter, Remote
    from proxy.repository.metadata import Backup


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
        self._completion = Completion(remote, directory, date)
        self.xva_name = f"{date}.xva"
        self._xva = f"{directory}/{date}.xva"
        self._checksum = f"{directory}/{date}.xva.checksum"
        self.size = 0
        """Bytes written so far, before encryption."""
        self._named = False

    @property
    def id(self) -> str:
        """The id of the backup to be, with a leading slash."""
        return self._completion.id

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
        content = encode_full(metadata, xva=self.xva_name, size=self.size)
        # what has no temporary name may not be readable before the commit; until the metadata is
        # there it is no backup under its final name either
        aside = paths.normalise(self._file.temporary_path) != paths.normalise(self._xva)
        if aside:
            await self._validate(self._file.temporary_path)
        self._named = True  # before the call: it may have an effect and still fail
        try:
            await self._file.commit()
        except Conflict:
            self._named = False  # the name is somebody else's, and so is what it names
            raise
        if not aside:
            await self._validate(self._xva)
        await self._check_size()
        if not self._remote.is_encrypted:
            assert len(checksum) == 16, "an MD5"
            await self._remote.write_file(self._checksum, b"$1$$" + checksum.hex().encode())
        return await self._completion.write(content)

    async def _validate(self, path: str) -> None:
        if self._validator is not None:
            await self._validator(path, self.size)

    async def _check_size(self) -> None:
        """Whether the storage holds what it said it wrote."""
        size = (await self._remote.stat(self._xva)).size
        if size != self.size:
            raise Corrupt(
                f"'{self._xva}' has {size} bytes after {self.size} were written",
                data={"path": self._xva, "actual": size, "expected": self.size},
            )

    async def undo(self) -> None:
        """Remove what carries a final name, unless metadata says that it is a backup."""
        if self._named:
            await self._completion.undo(self._xva, self._remove_data)

    async def _remove_data(self) -> None:
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
    it; ``path`` is where the bytes are at that moment.  Where nothing has a temporary name
    (immutable remotes, object stores) it runs behind step 2 and before step 3.

    The order, and what a crash right after each step leaves:

    1. bytes into ``.<ms>.<TS>.xva``: a file that no listing shows; the clean removes it.
       (An immutable remote writes to the final name: as 2.  An object store keeps an upload
       in parts, which nothing shows.)
    2. fsync and rename to ``<TS>.xva``: data without metadata; the clean removes it.
    3. ``<TS>.xva.checksum``: the same.
    4. ``<TS>.json``, atomic, exclusive, durable: *from here on it is a backup*.
    5. ``cache.json.gz``: before it, the cache lacks an entry; the next listing adds it.

    Leaving without :meth:`FullBackupWriter.commit`, an error and a cancel before step 4 ends
    remove everything written, data last (1 is the storage's own undo).
    """
    directory = vm_directory(vm_uuid)
    await remote.mktree(directory)
    if exclusive:
        date = await free_date(remote, directory, timestamp_ms)
    else:
        date = date_name(timestamp_ms)
        await _refuse_complete(remote, f"{directory}/{date}.json")
    async with remote.create(f"{directory}/{date}.xva", exclusive=exclusive) as file:
        writer = FullBackupWriter(remote, directory, date, file, validator)
        try:
            yield writer
        finally:
            await writer.undo()


async def _refuse_complete(remote: Remote, path: str) -> None:
    try:
        await remote.stat(path)
    except NotFound:
        return
    raise Conflict(f"the backup '{path}' exists already")
