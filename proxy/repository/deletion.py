"""Removing backups: by a client's wish and by retention."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import structlog

from proxy.errors import Many, NotFound, ProxyError, Refused
from proxy.repository.cache import read_directory, refresh_cache
from proxy.repository.clean import clean_vm
from proxy.repository.immutability import is_protected
from proxy.repository.locks import lock_vm
from proxy.repository.metadata import Backup, read_backup
from proxy.repository.paths import backup_path, split_backup_path, vm_directory, xva_name
from proxy.runtime.deadlines import undo_within

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy.remotes.interface import Lock, Remote

_log = structlog.get_logger(__name__)

_ONE_SECONDS = 300
"""For the files of one backup; file systems take long to free a file of terabytes."""


async def delete_backups(
    remote: Remote,
    filenames: Sequence[str],
    *,
    owner: str = "delete",
    wait: float = 0,
    locks: Mapping[str, Lock] | None = None,
) -> None:
    """Remove backups by id (``/xo-vm-backups/<vm>/<TS>.json``).

    Takes the lock of each VM directory, waiting up to ``wait`` seconds for each (``Busy``
    names the holder); a run that holds a lock already passes it in ``locks``, by
    VM uuid.  Nothing is removed unless every id is well formed, every metadata
    can be read and every mode is known.  A backup that does not exist is no error: only its
    cache entry is dropped.

    Order per backup: metadata (durably: it is no backup any more), ``.xva``, checksum; once
    per VM the cache.  After a crash in between, data without metadata is left for the
    clean.  The disks of delta backups always are: a run cleans by itself, for a client it is
    done here, without merging.  A cancel lets the backup at hand be
    removed whole and strikes before the next.  A failed removal does not stop the
    others and is raised at the end, ``Many`` when there are several.  One that the storage
    protects is ``Refused`` (``EPERM``): it stays whole and listed, or is unlisted and its data
    waits for a clean.
    """
    by_vm: dict[str, list[str]] = {}
    for filename in filenames:
        path = backup_path(filename)
        paths = by_vm.setdefault(split_backup_path(path)[0], [])
        if path not in paths:
            paths.append(path)
    held = dict(locks or {})
    async with contextlib.AsyncExitStack() as stack:
        # Sorted, so that two calls never wait for each other.
        for vm_uuid in sorted(by_vm):
            if vm_uuid not in held and await _exists(remote, vm_directory(vm_uuid)):
                held[vm_uuid] = await stack.enter_async_context(
                    lock_vm(remote, vm_uuid, owner=owner, wait=wait)
                )
        plans = {
            vm_uuid: await _plan(remote, vm_uuid, paths)
            for vm_uuid, paths in by_vm.items()
            if vm_uuid in held
        }
        errors: list[ProxyError] = []
        for vm_uuid, plan in plans.items():
            errors += await _delete_of_vm(remote, vm_uuid, plan, held[vm_uuid])
            if vm_uuid not in (locks or {}) and any(one.mode == "delta" for one, _ in plan):
                await _clean(remote, vm_uuid, held[vm_uuid])
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Many(f"{len(errors)} backups could not be deleted", errors)


async def _clean(remote: Remote, vm_uuid: str, lock: Lock) -> None:
    """The backups are gone whatever happens to their disks: trouble is logged."""

    def warn(message: str, data: dict[str, Any]) -> None:
        _log.warning(message, vm=vm_uuid, **data)

    try:
        await clean_vm(remote, vm_uuid, lock=lock, warn=warn, min_age=0)
    except ProxyError as error:
        _log.warning("disks of deleted backups are left", vm=vm_uuid, error=error.message)


async def _exists(remote: Remote, path: str) -> bool:
    try:
        await remote.stat(path)
    except NotFound:
        return False
    return True


async def _plan(
    remote: Remote, vm_uuid: str, paths: Sequence[str]
) -> list[tuple[Backup, list[str]]]:
    """Each backup that exists, with the data files that go with it."""
    backups: list[Backup] = []
    for path in paths:
        try:
            backup = (await read_backup(remote, path)).backup
        except NotFound:
            continue
        if backup.mode not in {"full", "delta"}:
            raise Refused(
                f"'{path}' has the unknown mode {backup.mode!r}: nothing was deleted", code="EINVAL"
            )
        backups.append(backup)
    if not any(backup.mode == "full" for backup in backups):
        return [(backup, []) for backup in backups]
    going = {backup.id for backup in backups}
    present = await read_directory(remote, vm_uuid)
    needed = {
        xva_name(backup.xva) for backup in present.backups if backup.id not in going and backup.xva
    }
    # A metadata file that nobody could read still claims the data of its own name.
    needed |= {name.removesuffix(".json") + ".xva" for name in present.unreadable}
    return [(backup, _data_of(backup, needed)) for backup in backups]


def _data_of(backup: Backup, needed: set[str | None]) -> list[str]:
    if backup.mode != "full":
        return []
    name = xva_name(backup.xva)
    if name is None or name in needed:
        _log.warning("the data of a deleted backup is kept", path=backup.id, xva=backup.xva)
        return []
    directory = backup.id.rpartition("/")[0]
    return [f"{directory}/{name}", f"{directory}/{name}.checksum"]


async def _delete_one(remote: Remote, backup: Backup, data: Sequence[str]) -> None:
    outcome = "it is protected and stays as it is until that ends"
    for path in (backup.id, *data):
        try:
            await remote.unlink(path)
        except Refused as error:
            if not await is_protected(remote, path, error):
                raise
            raise Refused(
                f"{error.message}: {outcome}", code="EPERM", data={**error.data, "id": backup.id}
            ) from error
        outcome = "it is no backup any more; a clean removes its data when the protection ends"


async def _delete_of_vm(
    remote: Remote, vm_uuid: str, plan: Sequence[tuple[Backup, list[str]]], lock: Lock
) -> list[ProxyError]:
    errors: list[ProxyError] = []
    for backup, data in plan:
        try:
            await lock.check()
        except ProxyError as error:
            errors.append(error)
            break  # the directory is somebody else's now
        try:
            with undo_within(f"deleting {backup.id}", _ONE_SECONDS):
                await _delete_one(remote, backup, data)
        except ProxyError as error:
            errors.append(error)
    try:
        await refresh_cache(remote, vm_uuid)
    except ProxyError as error:
        _log.warning("the listing cache is not up to date", vm=vm_uuid, error=error.message)
    return errors
