"""Removing what no backup needs from a VM directory, without ever guessing.

Temporary files of dead writers go, data without metadata, metadata whose data is gone;
disks that no backup stands on, and others are merged (:mod:`proxy.repository.delta_clean`).
Everything else stays, above all what could not be read: metadata that does not parse, of an
unknown mode, or that the storage failed to give protects the data of its name and all
disks of the VM; a directory that cannot be listed ends the clean with nothing removed.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import structlog

from proxy.errors import Many, NotFound, ProxyError
from proxy.repository.cache import cached_count, read_directory, refresh_cache
from proxy.repository.delta_clean import DeltaClean, silent
from proxy.repository.merge_queue import forget_queued
from proxy.repository.paths import CACHE_NAME, is_metadata_name, vm_directory, xva_name
from proxy.repository.removals import Removals
from proxy.repository.xva_check import is_valid_xva

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from proxy.remotes.interface import Lock, Remote
    from proxy.repository.cache import Directory
    from proxy.repository.delta_clean import Merging
    from proxy.repository.metadata import Backup
    from proxy.repository.removals import Warn

_log = structlog.get_logger(__name__)

ORPHAN_AGE = 3600.0
"""Seconds for which a file must not have changed before it can be an orphan.

The lock of the directory already says that nobody writes; this covers storages without
locks and a writer that lost its lock and does not know yet."""

_DATA = re.compile(r"(?P<stem>[0-9]{8}T[0-9]{6}Z)\.xva(\.checksum)?")
# Written as `.<ms>.<name>` by Xen Orchestra and as `.<ms>.<name>.tmp` by this daemon.
_TEMPORARY = re.compile(
    r"\.[0-9]{13}\.([0-9]{8}T[0-9]{6}Z\.(json|xva|xva\.checksum)|cache\.json\.gz)(\.tmp)?"
)


async def clean_vm(
    remote: Remote,
    vm_uuid: str,
    *,
    lock: Lock,
    warn: Warn,
    merge: bool = False,
    progress: Merging = silent,
    min_age: float = ORPHAN_AGE,
    now: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """Clean the directory of ``vm_uuid``, whose ``lock`` the caller holds.

    With ``merge`` chains are merged, one after the other, and on one remote two at once in the
    whole process; merges that somebody else began are finished.  Without, they are found and
    left.  ``progress(chain)`` is an async context around each merge; it gives a function
    that takes blocks done and blocks to do, or ``None``.

    Returns Xen Orchestra's result: ``merge`` says whether there was anything to merge,
    ``size`` is the sum of the merged disks' sizes in bytes.  ``warn`` gets Xen Orchestra's
    messages.  A file that cannot be removed is a warning; an error of the directory itself and
    a lost lock (``Busy``) are raised, and at the end the errors of merges.  May be stopped
    anywhere and run again.
    """
    found = await read_directory(remote, vm_uuid, use_cache=False)
    removals = Removals(remote, lock, warn, older_than=now() - min_age)
    clean = _Clean(remote, vm_uuid, found, removals, warn)
    await clean.check_cache()
    for name, error in found.unreadable.items():
        warn(f"Issue loading {name}", {"error": error.message, "path": clean.path(name)})
    for backup in found.backups:
        await clean.check_backup(backup)
    disks = DeltaClean(
        remote,
        vm_uuid,
        found,
        lock=lock,
        warn=warn,
        merging=progress if merge else None,
        removals=removals,
    )
    await disks.run()
    for name in clean.orphans():
        await clean.remove_orphan(name)
    try:
        await refresh_cache(remote, vm_uuid, disks.changed)
    except ProxyError as error:
        _log.warning("the listing cache is not up to date", vm=vm_uuid, error=error.message)
    if disks.errors:
        raise disks.errors[0] if len(disks.errors) == 1 else _several(disks.errors)
    if merge and not disks.pending:
        await forget_queued(remote, vm_uuid)
    return {"merge": disks.merged, "size": disks.size}


def _several(errors: Sequence[ProxyError]) -> Many:
    return Many(f"{len(errors)} merges failed", errors)


class _Clean:
    """One clean of one directory."""

    def __init__(
        self, remote: Remote, vm_uuid: str, found: Directory, removals: Removals, warn: Warn
    ) -> None:
        self._remote = remote
        self._vm_uuid = vm_uuid
        self._directory = vm_directory(vm_uuid)
        self._found = found
        self._names = frozenset(found.names)
        self._warn = warn
        self._removals = removals

    def path(self, name: str) -> str:
        return f"{self._directory}/{name}"

    async def check_cache(self) -> None:
        if self._remote.is_immutable or CACHE_NAME not in self._names:
            return
        actual = await cached_count(self._remote, self._vm_uuid)
        expected = len(self._found.backups)
        if actual is not None and actual != expected:
            self._warn(
                "unexpected number of entries in backup cache",
                {"path": self.path(CACHE_NAME), "actual": actual, "expected": expected},
            )

    async def check_backup(self, backup: Backup) -> None:
        """Warn of what is wrong with a full backup; remove it when its data is gone."""
        name = backup.id.rpartition("/")[2]
        if backup.mode == "delta":
            return
        xva = xva_name(backup.xva)
        if backup.mode != "full" or xva is None:
            self._warn(
                f"Issue loading {name}",
                {"error": "unknown mode or no data named", "mode": backup.mode, "path": backup.id},
            )
            return
        size = int(backup.size) if backup.size is not None else None
        try:
            valid = await is_valid_xva(self._remote, self.path(xva), size=size)
        except NotFound as error:
            await self._data_missing(backup, xva, error)
            return
        except ProxyError as error:
            self._warn("Issue while checking XVA", {"error": error.message, "path": self.path(xva)})
            return
        checksum = f"{xva}.checksum"
        if not self._remote.is_encrypted and checksum not in self._names:
            self._warn(
                "Checksum file not valid, not blocking",
                {"error": f"ENOENT: no such file or directory, open '{self.path(checksum)}'"},
            )
        if not valid:
            self._warn("XVA might be broken", {"path": self.path(xva)})
            files = [each for each in (name, xva, checksum) if each in self._names]
            self._warn("This files may be corrupted but not yet to be removed", {"files": files})

    async def _data_missing(self, backup: Backup, xva: str, error: NotFound) -> None:
        """Only when listing and look-up agree, and nothing but the name itself is missing."""
        if xva in self._names or error.code != "ENOENT":
            self._warn("Issue while checking XVA", {"error": error.message, "path": self.path(xva)})
            return
        self._warn("XVA is missing", {"path": self.path(xva)})
        if self._remote.is_immutable:
            return  # the storage promised to keep the data: it is the look-up that is wrong
        if await self._removals.remove(backup.id):
            await self._removals.remove(self.path(f"{xva}.checksum"))

    def orphans(self) -> list[str]:
        """Names that no metadata explains: temporary files and data of missing metadata."""
        needed = {xva_name(backup.xva) for backup in self._found.backups}
        needed |= {
            name.removesuffix(".json") + ".xva" for name in self._names if is_metadata_name(name)
        }
        return [name for name in sorted(self._names) if self._is_orphan(name, needed)]

    @staticmethod
    def _is_orphan(name: str, needed: Iterable[str | None]) -> bool:
        data = _DATA.fullmatch(name)
        if data is not None:
            return f"{data['stem']}.xva" not in needed
        return _TEMPORARY.fullmatch(name) is not None

    async def remove_orphan(self, name: str) -> None:
        try:
            stat = await self._remote.stat(self.path(name))
        except NotFound:
            return
        except ProxyError as error:
            self._removals.failed(self.path(name), error)
            return
        if stat.is_dir or stat.mtime > self._removals.older_than:
            return
        data = _DATA.fullmatch(name)
        if data is not None and await self._may_exist(self.path(f"{data['stem']}.json")):
            return
        await self._removals.remove(self.path(name))

    async def _may_exist(self, path: str) -> bool:
        """Asked again right before its data is removed; any doubt says yes."""
        try:
            await self._remote.stat(path)
        except NotFound as error:
            return error.code != "ENOENT"
        except ProxyError:
            return True
        return True
