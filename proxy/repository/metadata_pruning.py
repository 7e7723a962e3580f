"""Removing metadata backups: by retention, by a client's wish, and what dead runs left.

Only backups with readable metadata count for retention.  What has none is removed when it is
certain that nobody is writing it and that it is nothing else; what could not be read stays.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from proxy.errors import Many, NotFound, ProxyError, Refused
from proxy.repository.clean import ORPHAN_AGE
from proxy.repository.immutability import is_protected
from proxy.repository.metadata_backup_paths import METADATA_NAME, metadata_backup_path
from proxy.repository.metadata_backup_writer import lock_metadata
from proxy.repository.metadata_backups import read_dated
from proxy.repository.paths import timestamp_of
from proxy.runtime.deadlines import undo_within

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.remotes.interface import Lock, Remote

    Warn = Callable[[str, dict[str, Any]], None]

_ONE_SECONDS = 120
"""For one backup: few files, none of them large."""
_OURS = re.compile(r"data|data\.json|\.[0-9]{13}\.(data|data\.json|metadata\.json)(\.tmp)?")
"""Data, and temporary files of this daemon (``.<ms>.<name>.tmp``) and of Xen Orchestra
(``.<ms>.<name>``)."""


async def prune_metadata(
    remote: Remote,
    directory: str,
    *,
    keep: int,
    newest: str,
    lock: Lock,
    warn: Warn,
    now: Callable[[], float] = time.time,
) -> None:
    """Keep the ``keep`` latest backups in ``directory``, whose ``lock`` the caller holds.

    ``newest`` is the name of the one just written: it counts first, whatever the clock said
    when the others were made.  Each removal is asked of the lock first (``Busy``); one that
    fails does not stop the others and is raised at the end, one that the storage protects
    (``EPERM``: immutable files, Object Lock) is a warning.  A cancel lets the backup at hand be
    removed whole.  May be stopped anywhere and run again.
    """
    found = await read_dated(remote, directory)
    for name, error in found.unreadable.items():
        warn(
            f"the metadata of {name} cannot be read: it does not count for the retention and stays",
            {"path": f"{directory}/{name}", "error": error.message},
        )
    others = sorted(name for name in found.complete if name != newest)
    errors: list[ProxyError] = []
    protected: list[str] = []
    for name in others[: max(0, len(others) - max(0, keep - 1))]:
        await lock.check()
        try:
            await _remove(remote, f"{directory}/{name}")
        except ProxyError as error:
            first = f"{directory}/{name}/{METADATA_NAME}"
            if isinstance(error, Refused) and await is_protected(remote, first, error):
                protected.append(f"{name}: {error.message}")
            else:
                errors.append(error)
    if protected:
        warn(
            "old backups are protected and are removed by a later run",
            {"path": directory, "backups": protected},
        )
    for name in found.incomplete:
        if name != newest:
            await _remove_dead(remote, directory, name, lock, warn, older_than=now() - ORPHAN_AGE)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Many(f"{len(errors)} old backups could not be deleted", errors)


async def remove_unfinished(
    remote: Remote,
    directory: str,
    *,
    lock: Lock,
    warn: Warn,
    now: Callable[[], float] = time.time,
) -> list[str]:
    """Remove what dead runs left in ``directory``, whose ``lock`` the caller holds.

    The names of those that are no backup either but stay: young ones, since Xen Orchestra takes
    no lock, and what holds other files.  May be stopped anywhere and run again.
    """
    older_than = now() - ORPHAN_AGE
    return [
        name
        for name in (await read_dated(remote, directory)).incomplete
        if not await _remove_dead(remote, directory, name, lock, warn, older_than=older_than)
    ]


async def delete_metadata_backup(
    remote: Remote, backup_id: str, *, owner: str = "delete", wait: float = 0
) -> None:
    """Remove one backup by its id; one that does not exist is no error.

    Waits up to ``wait`` seconds for a run in the same directory (``Busy`` names it).  From the
    first removal on a cancel waits for the last.
    """
    path = metadata_backup_path(backup_id)
    directory = path.rpartition("/")[0]
    try:
        await remote.stat(path)
    except NotFound:
        return
    async with lock_metadata(remote, directory, owner=owner, wait=wait) as lock:
        await lock.check()
        await _remove(remote, path)


async def _remove(remote: Remote, path: str) -> None:
    """The metadata durably first: from then on it is no backup any more."""
    with undo_within(f"deleting {path}", _ONE_SECONDS):
        await remote.unlink(f"{path}/{METADATA_NAME}")
        await remote.rmtree(path)


async def _remove_dead(
    remote: Remote, directory: str, name: str, lock: Lock, warn: Warn, *, older_than: float
) -> bool:
    """Remove a directory without metadata that nobody can be writing; whether it is no more.

    In doubt it stays.
    """
    path = f"{directory}/{name}"
    try:
        files = await _dead_files(remote, path, warn, older_than=older_than)
        if files is None:
            return False
        await lock.check()
        with undo_within(f"removing {path}", _ONE_SECONDS):
            if not await _may_exist(remote, f"{path}/{METADATA_NAME}"):  # else it is a backup now
                for file in files:
                    await remote.unlink(file)
                await remote.rmdir(path)  # refuses when something has come since
    except NotFound:
        pass  # an object store knows no empty directory
    except ProxyError as error:
        warn(f"could not remove the unfinished backup {name}", {"path": path, "error": str(error)})
        return False
    return True


async def _dead_files(
    remote: Remote, path: str, warn: Warn, *, older_than: float
) -> list[str] | None:
    """The files of a directory without metadata; ``None`` when somebody may be writing it, or
    it is something else.

    We hold the lock, but Xen Orchestra takes none and object stores may have none: everything in
    it must be old.
    """
    name = path.rpartition("/")[2]
    named = timestamp_of(name)
    if named is None or named / 1000 > older_than:
        return None
    entries = await remote.list(path)
    if any(entry.is_dir or not _OURS.fullmatch(entry.name) for entry in entries):
        warn(
            f"{name} is no backup and holds files that are not a backup's: it stays",
            {"path": path},
        )
        return None
    files = [f"{path}/{entry.name}" for entry in entries]
    for file in files:
        if (await remote.stat(file)).mtime > older_than:
            return None
    return files


async def _may_exist(remote: Remote, path: str) -> bool:
    """Asked again right before its data is removed; any doubt says yes."""
    try:
        await remote.stat(path)
    except NotFound as error:
        return error.code != "ENOENT"
    return True
