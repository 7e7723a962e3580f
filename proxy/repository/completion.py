"""The step that makes stored data a backup: its metadata, last, atomic, durable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
import trio

from proxy.errors import Conflict, NotFound, ProxyError
from proxy.repository.cache import refresh_cache
from proxy.repository.metadata import LIMIT, Backup, decode_backup
from proxy.repository.paths import DATE_NAME, date_name
from proxy.runtime.deadlines import undo_within
from proxy.runtime.trouble import tell_trouble

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from proxy.remotes.interface import Remote

_log = structlog.get_logger(__name__)

_UNDO_SECONDS = 60
_METADATA_SECONDS = 120
_FREE_SECONDS = 3600
"""How far a taken name is moved before giving up: nobody writes 3,600 backups at once."""


class Completion:
    """One backup's ``<TS>.json``, from the moment when it does not exist yet."""

    def __init__(self, remote: Remote, directory: str, date: str) -> None:
        self._remote = remote
        self._vm_uuid = directory.rpartition("/")[2]
        self.id = f"{directory}/{date}.json"
        """The id of the backup to be, with a leading slash."""
        self.done = False
        """The backup is complete: nothing of it may be undone any more."""

    async def write(self, content: bytes) -> Backup:
        """Write the metadata and tell the listing cache; the backup as a listing shows it.

        A cancel before it strikes here; from then on it waits for the outcome, and
        strikes at the caller's next checkpoint.  ``Conflict`` when somebody else's metadata
        has the name.
        """
        backup = decode_backup(content, self.id)
        await trio.lowlevel.checkpoint_if_cancelled()
        with undo_within(f"writing {self.id}", _METADATA_SECONDS):
            try:
                await self._remote.write_file(self.id, content, exclusive=True)
            except Conflict:
                if not await self._is_there(content):
                    raise
        self.done = True
        with undo_within(f"the listing cache of {self._vm_uuid}", _UNDO_SECONDS):
            try:
                await refresh_cache(self._remote, self._vm_uuid, {self.id: content})
            except ProxyError as error:
                _log.warning(
                    "the listing cache is not up to date", path=self.id, error=error.message
                )
        return backup

    async def _is_there(self, content: bytes) -> bool:
        """Whether the metadata on the remote is ours, byte for byte: an answer was lost."""
        try:
            return await self._remote.read_file(self.id, limit=LIMIT) == content
        except NotFound:
            return False

    async def undo(self, what: str, remove: Callable[[], Awaitable[None]]) -> None:
        """Await ``remove`` unless metadata says that the data belongs to a backup.

        When it cannot be told whether the metadata exists, everything stays: a clean that
        can read the directory decides.  Shielded, bounded; trouble is told, never raised.
        """
        if self.done:
            return
        try:
            with undo_within(f"removing {what}", _UNDO_SECONDS):
                try:
                    await self._remote.stat(self.id)
                except NotFound:
                    await remove()
        except ProxyError as error:
            # What brought us here is the news; the clean finds what is left.
            tell_trouble("an unfinished backup is left", error, path=what)


async def names_in(remote: Remote, directory: str) -> list[str]:
    """None for a directory that is missing: on an object store it is while it holds nothing."""
    try:
        return [entry.name for entry in await remote.list(directory)]
    except NotFound as error:
        if error.code != "ENOENT":
            raise
        return []


async def free_date(
    remote: Remote,
    directory: str,
    timestamp_ms: float,
    *,
    after: str = "",
    others: Collection[str] = (),
) -> str:
    """The first date name from ``timestamp_ms`` on that nothing in ``directory`` has.

    Nor do ``others`` have it, and it sorts behind ``after``.  A temporary file and an orphan take
    a name too: their writer may still live where the storage has no locks.
    """
    names = await names_in(remote, directory)
    taken = {match[0] for name in (*names, *others) for match in DATE_NAME.finditer(name)}
    for seconds in range(_FREE_SECONDS):
        date = date_name(timestamp_ms + seconds * 1000)
        if date not in taken and date > after:
            return date
    raise Conflict(f"no free name for a backup in '{directory}' from {date_name(timestamp_ms)} on")
