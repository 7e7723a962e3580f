"""Removing from a VM directory what a clean has found to be nobody's."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from proxy.disks.merge import remove_disk
from proxy.errors import Busy, NotFound, ProxyError
from proxy.remotes import paths
from proxy.repository.chains import DATA
from proxy.repository.checksums import orphan_checksums

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from proxy.remotes.interface import Lock, Remote
    from proxy.repository.chains import Lineage

    Warn = Callable[[str, dict[str, Any]], None]
    """Takes a warning's message and its data (JSON values)."""


class Removals:
    """Each asks the lock first, and makes what cannot be removed a warning."""

    def __init__(self, remote: Remote, lock: Lock, warn: Warn, *, older_than: float) -> None:
        self._remote = remote
        self._lock = lock
        self._warn = warn
        self.older_than = older_than

    async def is_old(self, path: str) -> bool:
        """Whether nothing in it changed for so long that no writer can live; in doubt not."""
        try:
            stat = await self._remote.stat(path)
            newest = stat.mtime
            if stat.is_dir:
                async for _, inside in self._remote.walk(path):
                    newest = max(newest, inside.mtime)
        except ProxyError:
            return False
        return newest <= self.older_than

    async def remove(self, path: str) -> bool:
        """Remove a file; whether it is gone."""
        await self._lock.check()
        try:
            await self._remote.unlink(path)
        except ProxyError as error:
            self.failed(path, error)
            return False
        return True

    async def remove_data(self, path: str) -> None:
        """A file or a directory with all that is in it."""
        await self._lock.check()
        try:
            if (await self._remote.stat(path)).is_dir:
                await self._remote.rmtree(path)
            else:
                await self._remote.unlink(path)
        except NotFound:
            return
        except ProxyError as error:
            self.failed(path, error)

    async def remove_checksums(self, directory: str) -> None:
        """Those in a VDI directory whose disk is gone."""
        try:
            names = [entry.name for entry in await self._remote.list(directory)]
        except ProxyError:
            return  # the next clean finds them
        for name in orphan_checksums(names):
            await self.remove(paths.join(directory, name))

    async def delete(
        self, lineage: Lineage, disks: Sequence[str], elsewhere: Collection[str]
    ) -> set[str]:
        """Delete ``disks``, children first, with what they own; returns those that are gone.

        Young ones stay, and with any disk what it stands on.
        """
        gone: set[str] = set()
        for path in disks:
            if set(lineage.children(path)) - gone or not await self.is_old(path):
                continue
            owned = lineage.owns(path, elsewhere)
            try:
                await remove_disk(self._remote, path, lock=self._lock, owned=owned)
            except Busy:
                raise
            except ProxyError as error:
                self._warn("failed to delete unused disk", {"path": path, "error": error.message})
            else:
                gone.add(path)
        return gone

    async def remove_empty(self, directory: str) -> None:
        """Remove a VDI directory and those around it as far as they hold nothing: what is not
        empty refuses to go."""
        job = paths.parent(directory)
        with contextlib.suppress(ProxyError):
            for path in (paths.join(directory, DATA), directory, job, paths.parent(job)):
                await self._remote.rmdir(path)

    def failed(self, path: str, error: ProxyError) -> None:
        self._warn(f"Issue removing {paths.name(path)}", {"error": error.message, "path": path})
