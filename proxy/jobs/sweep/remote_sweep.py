"""What a dead run left on a remote.

Each directory is touched under its lock only: a VM's is cleaned as a run of that VM does first
(:func:`proxy.repository.clean_vm`, without merging), of a schedule's metadata backups the
directories without metadata go.  So nothing goes but by the rules of the repository: never
from a listing that is not whole, nothing that could not be read, nothing that somebody may be
writing.  A directory whose lock cannot be had stays, and is told.

What a lock says of its holder makes one thing more certain: files of a run of ours that the
journal knows as dead, and of an earlier process, need not grow old first.

Uploads that an object store shows in no listing are given up when they were begun during a run
of ours that died, on a VM that it backed up, and are a day old: Xen Orchestra takes no lock there,
and may be sending something at the same time.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, TypeVar

from proxy.errors import Busy, NotFound, ProxyError, Refused, Unauthorized
from proxy.jobs.sweep.findings import Fate, Report
from proxy.remotes import paths
from proxy.remotes.holding import ourselves, parse_record
from proxy.remotes.wrapper import (
    Operation,
    Wrapper,
    abort_upload_of,
    innermost,
    open_uploads_of,
)
from proxy.repository import clean_vm
from proxy.repository.clean import ORPHAN_AGE
from proxy.repository.metadata_backup_paths import CONFIG_ROOT, POOL_ROOT, is_folder_name
from proxy.repository.metadata_pruning import remove_unfinished
from proxy.repository.paths import DATE_NAME, ROOT, is_vm_name
from proxy.runtime.deadlines import deadline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence

    from proxy.jobs.sweep.findings import Entry, Fates
    from proxy.remotes.holding import Holder
    from proxy.remotes.interface import Lock, OpenUpload, Remote

    Culprit = Callable[[str, float], Awaitable[str | None]]
    """Of a VM and a time (seconds since the epoch): the run of ours that backed it up then and
    died, if there is one."""
    Clean = Callable[[str, Remote, Lock, str | None], Awaitable[None]]
    """Takes a directory, a remote that notes what goes, its lock, and the dead run that held
    it."""

T = TypeVar("T")

_STALE_SECONDS = 40.0
"""A lock that was not refreshed for so long is nobody's, be it a directory or a lease."""
_UPLOAD_AGE = 86400.0
_LOCK_SUFFIX = ".lock"
_RECORD_LIMIT = 4096
_RECORD_SECONDS = 30.0
_WRITES = frozenset({"create", "edit", "batch", "lock", "rename_all"})
"""What no clean does, and a dry run therefore refuses."""


async def sweep_remote(
    remote: Remote,
    fates: Fates,
    *,
    owner: str,
    dry_run: bool = False,
    only_ours: bool = False,
    culprit: Culprit | None = None,
) -> Report:
    """Clean what dead runs left; with ``dry_run`` only say it, and take no lock.

    ``owner`` is the run that does it.  With ``only_ours`` just the directories that a dead run of
    ours still holds, and no uploads.  What fails in one directory is in the report, and the
    others are tried; raises the error of the remote when it cannot be listed.  May be stopped
    anywhere and run again.
    """
    sweep = _Sweep(remote, fates, owner, dry_run=dry_run, only_ours=only_ours)
    uploads = {} if culprit is None or only_ours else await sweep.find_uploads()
    await sweep.vms(uploads, culprit or _nobody)
    await sweep.configurations()
    await sweep.pools()
    return sweep.report


class _Sweep:
    def __init__(
        self, remote: Remote, fates: Fates, owner: str, *, dry_run: bool, only_ours: bool
    ) -> None:
        self._remote = remote
        self._fates = fates
        self._owner = owner
        self._dry_run = dry_run
        self._only_ours = only_ours
        # Xen Orchestra takes no lock on object stores: there nothing young is certainly ours.
        self._locks_are_shared = getattr(innermost(remote), "capabilities", None) is None
        self.report = Report()

    async def find_uploads(self) -> dict[str, list[OpenUpload]]:
        """Those below the directory of each VM."""
        try:
            uploads = await open_uploads_of(self._remote, ROOT)
        except (Refused, Unauthorized) as error:
            self.report.left.append(
                _entry("upload", ROOT, f"unfinished uploads cannot be looked for: {error.message}")
            )
            return {}
        except ProxyError as error:  # a strange answer to this question says nothing of the rest
            self.report.failed(_entry("upload", ROOT, "unfinished uploads were not found"), error)
            return {}
        found: dict[str, list[OpenUpload]] = {}
        for upload in uploads:
            below = f"/{paths.normalise(upload.path)}".removeprefix(f"{ROOT}/")
            found.setdefault(below.partition("/")[0], []).append(upload)
        return found

    async def vms(self, uploads: Mapping[str, Sequence[OpenUpload]], culprit: Culprit) -> None:
        async def clean(path: str, remote: Remote, lock: Lock, run: str | None) -> None:
            vm_uuid = paths.name(path)
            certain = run is not None and self._locks_are_shared
            await clean_vm(
                remote,
                vm_uuid,
                lock=lock,
                warn=self._warned(path),
                min_age=0.0 if certain else ORPHAN_AGE,
            )
            for upload in uploads.get(vm_uuid, ()):
                await self._upload(upload, await culprit(vm_uuid, upload.initiated), lock)

        # A store knows no directory in which nothing was completed.
        await self._each(ROOT, is_vm_name, clean, more=uploads)

    async def _upload(self, upload: OpenUpload, run: str | None, lock: Lock) -> None:
        begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(upload.initiated))
        entry = _entry("upload", upload.path, f"an upload of {begun} that was not finished", run)
        why: str | None = None
        if run is None:
            why = "no run of this daemon that died is known to have begun it"
        elif time.time() - upload.initiated < _UPLOAD_AGE:
            why = "it is not a day old"
        if why is not None:
            self.report.left.append({**entry, "reason": f"{entry['reason']}; {why}"})
            return
        if not self._dry_run:
            await lock.check()
            await abort_upload_of(self._remote, upload)
        self.report.swept.append(entry)

    async def configurations(self) -> None:
        await self._each(CONFIG_ROOT, is_folder_name, self._dated)

    async def pools(self) -> None:
        for schedule in await self._names(POOL_ROOT):
            if is_folder_name(schedule):
                await self._each(f"{POOL_ROOT}/{schedule}", is_folder_name, self._dated)

    async def _dated(self, path: str, remote: Remote, lock: Lock, run: str | None) -> None:
        del run  # Xen Orchestra takes no lock here: everything must be old
        kept = await remove_unfinished(remote, path, lock=lock, warn=self._warned(path))
        for name in kept:
            self.report.left.append(
                _entry(
                    "directory",
                    f"{path}/{name}",
                    "a metadata backup that was not finished; it is young, or holds other files",
                )
            )

    async def _each(
        self,
        directory: str,
        is_name: Callable[[str], bool],
        clean: Clean,
        *,
        more: Iterable[str] = (),
    ) -> None:
        names = {**dict.fromkeys(more, True), **await self._names(directory)}
        for name in sorted(names):
            if not is_name(name) or not names[name]:
                continue
            path = f"{directory}/{name}"
            locked = f"{name}{_LOCK_SUFFIX}" in names
            run = await self._dead(await self._holder(path)) if locked else None
            if self._only_ours and run is None:
                continue
            try:
                await self._one(path, run, clean, locked=locked)
            except Busy as busy:
                self.report.left.append(_entry("directory", path, busy.message))
            except NotFound:
                continue  # gone meanwhile
            except ProxyError as error:
                self.report.failed(_entry("directory", path, "not cleaned"), error)

    async def _names(self, directory: str) -> dict[str, bool]:
        """What the directory holds, and of each whether it is a directory; nothing when missing."""
        try:
            entries = await self._remote.list(directory)
        except NotFound as error:
            if error.code != "ENOENT":
                raise
            return {}
        return {entry.name: entry.is_dir for entry in entries}

    async def _one(
        self,
        path: str,
        run: str | None,
        clean: Clean,
        *,
        locked: bool,
    ) -> None:
        noted = _Noted(self._remote, dry_run=self._dry_run)
        try:
            async with self._locked(path, locked=locked) as lock:
                if locked:
                    self.report.swept.append(
                        _entry("lock", path + _LOCK_SUFFIX, "nobody held it any more", run)
                    )
                await clean(path, noted, lock, run)
        finally:
            for removed in noted.removed:
                self.report.swept.append(_entry("file", removed, "no backup needs it", run))

    @contextlib.asynccontextmanager
    async def _locked(self, path: str, *, locked: bool) -> AsyncIterator[Lock]:
        if self._dry_run:
            if locked:
                await self._refuse_held(path)
            yield _NoLock()
            return
        async with self._remote.lock(path, owner=self._owner) as lock:
            yield lock

    async def _refuse_held(self, path: str) -> None:
        """Taking the lock is how to know for sure, which a dry run must not do."""
        try:
            stat = await self._remote.stat(path + _LOCK_SUFFIX)
        except NotFound:
            return
        holder = await self._holder(path)
        gone = holder is not None and (holder.is_dead() or await self._dead(holder) is not None)
        if not gone and time.time() - stat.mtime < _STALE_SECONDS:
            by = f" by {holder}" if holder else ""
            raise Busy(f"Lock file is already being held{by}, '{path}'", data={"path": path})

    async def _holder(self, path: str) -> Holder | None:
        """Who says to hold the lock: in a file beside it, in an object store in its own."""
        directory, name = paths.parent(path), paths.name(path)
        record = (
            f"{directory}/.{name}.lock-holder" if self._locks_are_shared else path + _LOCK_SUFFIX
        )
        try:
            with deadline("reading who holds a lock", _RECORD_SECONDS):
                content = await _plain(self._remote).read_file(record, limit=_RECORD_LIMIT)
        except ProxyError:
            return None
        return parse_record(content)

    async def _dead(self, holder: Holder | None) -> str | None:
        """The id of the holder when it is a run of ours that died with its process."""
        if holder is None or await self._fates(holder.owner) is not Fate.DEAD:
            return None
        here = ourselves()
        same = all(
            getattr(holder, key) == here[key] for key in ("pid", "started", "boot", "namespace")
        )
        return None if same else holder.owner

    def _warned(self, path: str) -> Callable[[str, Mapping[str, Any]], None]:
        def warn(message: str, data: Mapping[str, Any]) -> None:
            said = data.get("error")
            reason = f"{message}: {said}" if said else message
            where = str(data.get("path") or path)
            if not any(e["path"] == where and e["reason"] == reason for e in self.report.left):
                self.report.left.append(_entry("file", where, reason))

        return warn


def _entry(kind: str, path: str, reason: str, run: str | None = None) -> Entry:
    return {
        "type": kind,
        "path": path,
        "name": paths.name(path),
        "run": run or "",
        "reason": reason,
    }


async def _nobody(vm_uuid: str, at: float) -> str | None:
    del vm_uuid, at
    return None


def _plain(remote: Remote) -> Remote:
    """The remote beneath its encryption: locks are for everybody."""
    while remote.is_encrypted and isinstance(remote, Wrapper):
        remote = remote.inner
    return remote


class _NoLock:
    async def check(self) -> None:
        """Nothing is removed under it."""


class _Noted(Wrapper):
    """Notes what is removed; in a dry run nothing is changed, but answered as if it were."""

    def __init__(self, inner: Remote, *, dry_run: bool) -> None:
        super().__init__(inner)
        self._dry_run = dry_run
        self.removed: list[str] = []

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        if self._dry_run and operation.verb.partition(".")[0] in _WRITES:
            raise Refused(f"a dry run does not {operation.verb}", code="EROFS")
        return await run()

    async def unlink(self, path: str, *, missing_ok: bool = True) -> None:
        there = await self._is_there(path)
        if not self._dry_run:
            await super().unlink(path, missing_ok=missing_ok)
        if there:
            self.removed.append(path)

    async def _is_there(self, path: str) -> bool:
        try:
            await self.stat(path)
        except NotFound:
            return False
        return True

    async def rmtree(self, path: str) -> None:
        if not self._dry_run:
            await super().rmtree(path)
        self.removed.append(path)

    async def rmdir(self, path: str, *, missing_ok: bool = True) -> None:
        if not self._dry_run:
            await super().rmdir(path, missing_ok=missing_ok)
        if DATE_NAME.fullmatch(paths.name(path)):  # of a metadata backup: it may have held nothing
            self.removed.append(path)

    async def write_file(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        if not self._dry_run:
            await super().write_file(path, data, exclusive=exclusive)

    async def rename(self, old: str, new: str) -> None:
        if not self._dry_run:
            await super().rename(old, new)

    async def mktree(self, path: str) -> None:
        if not self._dry_run:
            await super().mktree(path)
