"""Records what was done to a remote, in order, to build what a crash would have left.

:func:`replay` of the first *k* changes gives the remote as it was at that instant; a test
goes through all *k*.  Each change is durable when its call returns (see
:mod:`proxy.remotes.interface`) but for the bytes of an uncommitted file, which a crash may
lose: ``lose_unsynced`` replays that.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from proxy.errors import NotFound
from proxy.remotes import paths
from proxy.remotes.wrapper import Operation, Wrapper

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from pathlib import Path

    from proxy.remotes.interface import Remote

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Change:
    """One effect on the remote; paths are normalised.

    ``append`` adds ``data`` to ``path``, not yet durable; ``put`` sets its whole content;
    ``rename`` moves ``path`` to ``target``.
    """

    kind: Literal["append", "put", "rename", "unlink", "mkdir", "rmdir"]
    path: str
    target: str | None = None
    data: bytes = b""
    durable: bool = True


class Recording(Wrapper):
    """``changes`` in the order in which they ended; failed operations are left out.

    ``rmtree`` is recorded as the single removals it consists of.  Not recorded are locks'
    mtimes and what other programs do.
    """

    def __init__(self, inner: Remote) -> None:
        super().__init__(inner)
        self.changes: list[Change] = []

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        removed = await self._tree(operation.path) if operation.verb == "rmtree" else []
        present = operation.verb not in ("unlink", "rmdir") or await self._exists(operation.path)
        result = await run()
        if removed:
            self.changes.extend(removed)
        elif present:
            self._record(operation)
        return result

    async def _exists(self, path: str) -> bool:
        try:
            await self.inner.stat(path)
        except NotFound:
            return False
        return True

    async def _tree(self, top: str) -> list[Change]:
        if not (await self._exists(top) and (await self.inner.stat(top)).is_dir):
            return []
        files: list[Change] = []
        directories = [paths.normalise(top)]
        for directory in directories:  # grows while we go
            for entry in await self.inner.list(directory):
                full = paths.join(directory, entry.name)
                if entry.is_dir:
                    directories.append(full)
                else:
                    files.append(Change("unlink", full))
        return files + [Change("rmdir", directory) for directory in reversed(directories)]

    def _record(self, operation: Operation) -> None:
        path = paths.normalise(operation.path)
        target = None if operation.target is None else paths.normalise(operation.target)
        match operation.verb:
            case "write_file":
                self.changes.append(Change("put", path, data=bytes(operation.data or b"")))
            case "create.write":
                data = bytes(operation.data or b"")
                self.changes.append(Change("append", target or path, data=data, durable=False))
            case "create.commit":
                self.changes.append(Change("rename", target or path, path))
            case "create.close" if target is not None and not self._is_committed(target):
                self.changes.append(Change("unlink", target))
            case "rename":
                self.changes.append(Change("rename", path, target))
            case "unlink" | "rmdir":
                self.changes.append(Change(operation.verb, path))
            case "mktree":
                self.changes.append(Change("mkdir", path))
            case "lock.held":
                self.changes.append(Change("mkdir", f"{path}.lock"))
            case "lock.release":
                self.changes.append(Change("rmdir", f"{path}.lock"))
            case _:
                pass

    def _is_committed(self, temporary: str) -> bool:
        for change in reversed(self.changes):
            if change.path == temporary:
                return change.kind == "rename"
        return False


def replay(changes: Iterable[Change], directory: Path, *, lose_unsynced: bool = False) -> None:
    """Do ``changes`` to a plain ``directory``.

    With ``lose_unsynced`` the bytes that were not durable yet are missing from files that are
    still temporary at the end, though their names are there.
    """
    unsynced: set[Path] = set()
    for change in changes:
        path = directory / change.path
        match change.kind:
            case "append" | "put":
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab" if change.kind == "append" else "wb") as file:
                    file.write(change.data)
                if not change.durable:
                    unsynced.add(path)
            case "rename" if change.target is not None:
                target = directory / change.target
                target.parent.mkdir(parents=True, exist_ok=True)
                unsynced.discard(path)
                if not path.exists():  # committed without a byte
                    path.touch()
                path.rename(target)
            case "unlink":
                unsynced.discard(path)
                path.unlink(missing_ok=True)
            case "mkdir":
                path.mkdir(parents=True, exist_ok=True)
            case "rmdir":
                shutil.rmtree(path, ignore_errors=True)
            case _:
                raise AssertionError(change)
    if lose_unsynced:
        for path in unsynced:
            path.write_bytes(b"")
