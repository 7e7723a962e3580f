"""Cleaning the disks of a VM's delta backups: checks, merges, removals.

:mod:`proxy.repository.planning` decides; here it is done, in this order: backups that are
provably no longer there lose their metadata; then for each VDI directory interrupted
merges, unneeded disks, new merges, orphaned data; a merged backup's metadata is brought
up to date before the state of its merge goes, so that no crash leaves it behind.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from proxy.disks.merge import merge_chain
from proxy.disks.merge_state import Phase, Step, is_disk_name, remove_state
from proxy.errors import Busy, NotFound, ProxyError
from proxy.remotes import paths
from proxy.remotes.wrapper import protected_of
from proxy.repository.checksums import merging_checksums
from proxy.repository.immutability import is_declared, is_protection
from proxy.repository.lineage import read_lineage, stored_disk
from proxy.repository.metadata import LIMIT, with_disks
from proxy.repository.paths import DISKS_NAME, vm_directory
from proxy.repository.planning import plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from proxy.disks.merge import Progress
    from proxy.disks.merge_state import MergeState
    from proxy.remotes.interface import Lock, Remote
    from proxy.repository.cache import Directory
    from proxy.repository.chains import Lineage, StoredDisk
    from proxy.repository.metadata import Backup
    from proxy.repository.planning import Plan
    from proxy.repository.removals import Removals, Warn

    Merging = Callable[[Sequence[str]], AbstractAsyncContextManager[Progress | None]]

_MERGES = 2
"""Merges at once on one remote; of one VM there is one."""
_ROUNDS = 5
"""How often a directory is looked at again after interrupted merges were finished."""

_limits: trio.lowlevel.RunVar[dict[str, trio.CapacityLimiter]] = trio.lowlevel.RunVar("merges")


def _limit(remote: Remote) -> trio.CapacityLimiter:
    try:
        limits = _limits.get()
    except LookupError:
        limits = dict[str, trio.CapacityLimiter]()
        _limits.set(limits)
    return limits.setdefault(remote.url, trio.CapacityLimiter(_MERGES))


@contextlib.asynccontextmanager
async def silent(chain: Sequence[str]) -> AsyncIterator[Progress | None]:
    """Tell nobody of a merge."""
    del chain
    yield None


class DeltaClean:
    """One clean of the disks of one VM."""

    def __init__(
        self,
        remote: Remote,
        vm_uuid: str,
        found: Directory,
        *,
        lock: Lock,
        warn: Warn,
        merging: Merging | None,
        removals: Removals,
    ) -> None:
        """``merging`` is entered around each merge with its chain; ``None``: merge nothing."""
        self._remote = remote
        self._directory = vm_directory(vm_uuid).lstrip("/")
        self._found = found
        self._lock = lock
        self._warn = warn
        self._merging = None if remote.is_immutable else merging
        self._removals = removals
        self._lineages: dict[str, Lineage | None] = {}
        """By VDI directory; ``None`` where it could not be looked at."""
        self._disks: dict[str, StoredDisk] = {}
        """What is known of each readable disk by now."""
        self._references: dict[str, dict[str, str]] = {}
        """The disks of each delta backup by its id."""
        self._protected = False
        self.merged = False
        """There was something to merge, done or not."""
        self.pending = False
        """There still is, or may be."""
        self.size = 0
        """Bytes, as VHD streams, of the disks that others were merged into."""
        self.changed: dict[str, bytes] = {}
        """Metadata files that were rewritten, with their content."""
        self.errors: list[ProxyError] = []

    async def run(self) -> None:
        """Lost locks are raised at once; errors of merges are in :attr:`errors`."""
        backups = [backup for backup in self._found.backups if backup.mode == "delta"]
        self._protected = bool(self._found.unreadable) or any(
            backup.mode not in ("full", "delta") for backup in self._found.backups
        )
        self._references = {backup.id: self._disks_of(backup) for backup in backups}
        for directory in await self._directories():
            await self._look(directory)
        self.pending = self._protected or None in self._lineages.values()
        for backup in backups:
            await self._check(backup.id, self._references[backup.id])
        active = {path for disks in self._references.values() for path in disks.values()}
        for directory in self._lineages:
            await self._clean(directory, active)

    # -- what there is

    def _disks_of(self, backup: Backup) -> dict[str, str]:
        """The paths of a backup's disks by their references, or by number in old metadata.

        A backup that names nothing, or something else than disks, may mean anything.
        """
        named = backup.vhds if backup.vhds is not None else {}
        if not isinstance(named, dict):
            named = {str(number): path for number, path in enumerate(named)}
        if not named:
            self._warn("incremental backup has no disk paths", {"path": backup.id})
            self._protected = True
        disks: dict[str, str] = {}
        for reference, name in named.items():
            path = paths.join(self._directory, name.replace("\0", ""))
            parts = path.removeprefix(f"{self._directory}/").split("/")
            if len(parts) == 4 and parts[0] == DISKS_NAME and is_disk_name(parts[3]):
                disks[reference] = path
            else:
                self._warn("disk check error", {"path": path, "metadataPath": backup.id})
                self._protected = True
        return disks

    async def _directories(self) -> list[str]:
        top = paths.join(self._directory, DISKS_NAME)
        found: list[str] = []
        for job in await self._subdirectories(top):
            found += await self._subdirectories(job)
        return found

    async def _subdirectories(self, path: str) -> list[str]:
        try:
            entries = await self._remote.list(path)
        except NotFound:
            return []
        except ProxyError as error:
            self._warn("failed to list VDI directory", {"path": path, "error": error.message})
            self._protected = True  # other disks may be in it, and aliases of these
            return []
        return [paths.join(path, entry.name) for entry in entries if entry.is_dir]

    async def _look(self, directory: str) -> Lineage | None:
        lineage = None
        try:
            lineage = await read_lineage(self._remote, directory)
        except ProxyError as error:
            self._warn("failed to list VDI directory", {"path": directory, "error": error.message})
        self._lineages[directory] = lineage
        if lineage is not None:
            self._disks |= lineage.disks
        return lineage

    # -- backups

    async def _check(self, metadata: str, references: Mapping[str, str]) -> None:
        """Warn of an incomplete backup; forget it when a disk of it is provably gone."""
        missing: list[str] = []
        broken: list[str] = []
        for path in references.values():
            lineage = self._lineages.get(paths.parent(path))
            if lineage is not None and _is_merged(lineage, path):
                continue
            if lineage is None or any(
                each in lineage.unreadable or each in lineage.dangling
                for each in lineage.ancestors(path)
            ):
                broken.append(path)
            elif path not in lineage:
                missing.append(path)
            elif not _is_merging(lineage, path) and _root(lineage, path) is None:
                broken.append(path)
        if not missing and not broken:
            return
        gone = [path for path in missing if await self._is_gone(path)]
        if not broken and not gone:
            return  # a merge under way explains it
        for path in gone:
            self._warn("disk file missing", {"path": path})
        self._warn(
            "incremental backup is incomplete",
            {"metadataPath": metadata, "missingDisks": missing, "brokenDisks": broken},
        )
        if gone and not self._remote.is_immutable:
            await self._removals.remove(metadata)

    async def _is_gone(self, path: str) -> bool:
        """Listing and look-up agree, and no merge can have taken the name away."""
        lineage = self._lineages.get(paths.parent(path))
        if lineage is None or lineage.bad_states or _is_merging(lineage, path):
            return False
        try:
            await self._remote.stat(path)
        except NotFound as error:
            return error.code == "ENOENT"
        except ProxyError:
            return False
        return False

    async def _update(self, disk: str) -> None:
        """Make the metadata that names ``disk`` say what its disks are now."""
        for metadata, references in self._references.items():
            if disk in references.values():
                with contextlib.suppress(NotFound):  # it was incomplete
                    await self._rewrite(metadata, references)

    async def _rewrite(self, metadata: str, references: Mapping[str, str]) -> None:
        known = {
            reference: self._disks[path]
            for reference, path in references.items()
            if path in self._disks
        }
        is_whole = len(known) == len(references)
        before = await self._remote.read_file(metadata, limit=LIMIT)
        after = with_disks(
            before,
            size=sum(disk.size for disk in known.values()) if is_whole else None,
            differencing={
                reference: disk.is_differencing
                for reference, disk in known.items()
                if not reference.isdecimal()  # a number in a list is no reference
            },
        )
        if after != before:
            await self._lock.check()
            await self._remote.write_file(metadata, after)
            self.changed[metadata] = after

    # -- one VDI directory

    async def _clean(self, directory: str, active: Collection[str]) -> None:
        lineage = self._lineages[directory]
        if lineage is None:
            return
        todo = self._plan(lineage, active)
        self.merged |= bool(todo.resume or todo.merge)
        for _ in range(_ROUNDS if self._merging is not None else 0):
            if not todo.resume:
                break
            done = [
                await self._merge(lineage, each.chain, each.state, each.phase)
                for each in todo.resume
            ]
            looked = await self._look(directory)
            if looked is None:
                return
            lineage = looked
            todo = self._plan(lineage, active)
            if not all(done):
                break
        for message, data in todo.warnings:
            self._warn(message, data)
        self.pending |= bool(todo.resume)
        await self._do(lineage, todo)

    def _plan(self, lineage: Lineage, active: Collection[str]) -> Plan:
        inside = [path for path in active if paths.parent(path) == lineage.directory]
        return plan(lineage, inside, protected=self._protected, elsewhere=self._claims(lineage))

    async def _do(self, lineage: Lineage, todo: Plan) -> None:
        for path in todo.temporary:
            if await self._removals.is_old(path):
                await self._removals.remove(path)
        gone = await self._removals.delete(lineage, todo.delete, self._claims(lineage))
        for chain in todo.merge:
            stay = {each for path in chain[:-1] for each in lineage.children(path)} - gone
            is_free = self._merging is not None and stay <= set(chain)
            if not (is_free and await self._merge(lineage, chain, None, Phase.BLOCKS)):
                self.pending = True
        for path in todo.forget:
            await self._removals.remove(path)
        for path in todo.data:
            self._warn("orphaned data file", {"path": path})
            if await self._removals.is_old(path):
                await self._removals.remove_data(path)
        await self._removals.remove_checksums(lineage.directory)
        is_empty = not (lineage.disks.keys() | lineage.dangling.keys()) - gone
        if is_empty and not self._protected:
            await self._removals.remove_empty(lineage.directory)

    def _claims(self, lineage: Lineage) -> list[str]:
        return [
            target
            for other in self._lineages.values()
            if other is not None and other.directory != lineage.directory
            for target in other.aliases.values()
            if target is not None
        ]

    async def _merge(
        self, lineage: Lineage, chain: Sequence[str], state: MergeState | None, phase: Phase
    ) -> bool:
        """Whether it was done; an error is kept, and what was merged so far stays so."""
        assert self._merging is not None
        if await is_declared(self._remote) and any(await protected_of(self._remote, chain)):
            self._wait(chain, "protected against changes")
            return False
        claims = self._claims(lineage)
        try:
            async with _limit(self._remote), self._merging(chain) as progress:
                async with merging_checksums(self._remote, chain):
                    await merge_chain(
                        self._remote,
                        chain,
                        lock=self._lock,
                        owned=[path for path in chain if lineage.owns(path, claims)],
                        state=state,
                        phase=phase,
                        progress=progress,
                    )
                await self._settle(chain)
        except Busy:
            raise
        except ProxyError as error:
            if is_protection(error):
                self._wait(chain, error.message)
            else:
                self.errors.append(error)
            return False
        return True

    def _wait(self, chain: Sequence[str], why: str) -> None:
        """Its disks can be read as they are; another clean merges them."""
        self.pending = True
        self._warn("the disks are protected, their merge waits", {"chain": chain, "error": why})

    async def _settle(self, chain: Sequence[str]) -> None:
        """The merge is done: tell metadata, then forget the merge.

        With metadata that cannot be written it is not done: the next clean tells it.
        """
        for path in chain[:-1]:
            self._disks.pop(path, None)
        disk = await stored_disk(self._remote, chain[-1])
        self._disks[disk.path] = disk
        self.size += disk.size
        await self._update(disk.path)
        await self._lock.check()
        await remove_state(self._remote, chain[0])


def _is_merging(lineage: Lineage, path: str) -> bool:
    """Whether a merge under way may be why a disk, or what it stands on, is not there."""
    chain = set(lineage.ancestors(path))
    return any(
        oldest in chain
        or state.chain is None
        or any(paths.join(lineage.directory, name) in chain for name in state.chain)
        for oldest, state in lineage.states.items()
    )


def _is_merged(lineage: Lineage, path: str) -> bool:
    """Whether all of ``path`` is in the oldest disk of its merge already, so that it may be
    half removed."""
    return any(
        state.step is Step.CLEANUP
        and state.chain is not None
        and state.child_uuid is not None
        and path == paths.join(lineage.directory, state.chain[-1])
        and oldest in lineage.disks
        and lineage.disks[oldest].uuid == state.child_uuid
        for oldest, state in lineage.states.items()
    )


def _root(lineage: Lineage, path: str) -> str | None:
    *_, last = lineage.ancestors(path)
    disk = lineage.disks.get(last)
    return last if disk is not None and disk.parent is None else None
