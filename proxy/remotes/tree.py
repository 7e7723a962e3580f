"""What remotes that consist of real directories do alike, whoever does the single steps.

A single step blocks in a thread: of this machine's file system (:mod:`proxy.remotes.posix`) or on
an SMB share (:mod:`proxy.remotes.smb.share`).
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeVar

from proxy.errors import Conflict, NotFound, ProxyError, Refused
from proxy.remotes import paths
from proxy.runtime.deadlines import undo_within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from proxy.remotes.interface import Entry, FileStat, RemoteInfo

T = TypeVar("T")

UNDO_SECONDS: Final = 30
_CLEAR_ROUNDS: Final = 3
"""How often a directory is emptied again when somebody fills it while it is removed."""


class Names(Protocol):
    """The steps, all of which block."""

    def entries(self, path: str) -> list[Entry]: ...
    def list_with_stat(self, path: str) -> list[tuple[str, FileStat]]: ...
    def stat(self, path: str) -> FileStat: ...
    def info(self) -> RemoteInfo: ...
    def rename(self, old: str, new: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def mktree(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def clear(self, path: str) -> list[str]:
        """Remove the files in a directory; returns the directories in it."""
        ...


class _Renames(Protocol):
    missing: list[int]

    def run(self, pairs: Sequence[tuple[str, str]], first: int = 0) -> None: ...
    def sync(self) -> None: ...


class TreeRemote:
    """See :class:`proxy.remotes.interface.Remote` for the contract."""

    files_per_hop: ClassVar[int]
    renames_per_hop: ClassVar[int]
    """A hop to a thread costs more than a small file, or a rename."""

    def __init__(
        self, names: Names, *, url: str, is_immutable: bool, use_vhd_directory: bool
    ) -> None:
        self._names = names
        self.url = url
        self.is_immutable = is_immutable
        self.use_vhd_directory = use_vhd_directory

    async def step(self, function: Callable[..., T], *args: object, looks: bool = False) -> T:
        """Call one of the ``names``' functions in a thread.  One that only ``looks`` may be
        let go of at once."""
        raise NotImplementedError

    async def end(self, function: Callable[[], None]) -> None:
        """Call the end or the undo of something."""
        raise NotImplementedError

    def new_renames(self) -> _Renames:
        raise NotImplementedError

    def is_protected(self, path: str) -> bool:
        """Blocks; see :meth:`protected`."""
        raise NotImplementedError

    async def list(self, path: str) -> list[Entry]:
        return await self.step(self._names.entries, path, looks=True)

    async def stat(self, path: str) -> FileStat:
        return await self.step(self._names.stat, path, looks=True)

    async def info(self) -> RemoteInfo:
        return await self.step(self._names.info, looks=True)

    async def rename(self, old: str, new: str) -> None:
        if self.is_immutable:
            raise immutable("renamed", old)
        await self.step(self._names.rename, old, new)

    async def rename_all(self, pairs: Sequence[tuple[str, str]]) -> Sequence[int]:
        if self.is_immutable and pairs:
            raise immutable("renamed", pairs[0][0])
        renames = self.new_renames()
        async with self.ended(
            "making renames durable", renames.sync, note="a crash may undo what was renamed"
        ):
            for first in range(0, len(pairs), self.renames_per_hop):
                some = pairs[first : first + self.renames_per_hop]
                await self.step(renames.run, some, first)
            await self.step(renames.sync)
        return tuple(renames.missing)

    async def unlink(self, path: str, *, missing_ok: bool = True) -> None:
        await self._removed(self._names.unlink, path, missing_ok=missing_ok)

    async def rmdir(self, path: str, *, missing_ok: bool = True) -> None:
        await self._removed(self._names.rmdir, path, missing_ok=missing_ok)

    async def _removed(
        self, function: Callable[[str], None], path: str, *, missing_ok: bool
    ) -> None:
        try:
            await self.step(function, path)
        except NotFound as error:
            if not (missing_ok and error.code == "ENOENT"):
                raise

    async def mktree(self, path: str) -> None:
        await self.step(self._names.mktree, path)

    async def rmtree(self, path: str) -> None:
        """One directory per step, so that a cancel takes effect between two."""
        if not paths.normalise(path):
            raise Refused(
                "EBUSY: the root of a remote cannot be removed", code="EBUSY", data={"path": "/"}
            )
        try:
            if not (await self.stat(path)).is_dir:
                raise Conflict(
                    f"ENOTDIR: not a directory, rmtree '{path}'",
                    code="ENOTDIR",
                    data={"path": path},
                )
            await self._remove(paths.normalise(path))
        except NotFound as error:
            if error.code != "ENOENT":
                raise

    async def _remove(self, top: str) -> None:
        # (directory, times it was emptied); depth first without recursion: a hostile
        # remote may nest deeper than the interpreter's stack
        pending = [(top, 0)]
        while pending:
            directory, rounds = pending.pop()
            try:
                if rounds:
                    await self.step(self._names.rmdir, directory)
                    continue
            except Conflict:
                if rounds > _CLEAR_ROUNDS:
                    raise
            except NotFound as error:
                if error.code != "ENOENT":
                    raise
                continue
            try:
                below = await self.step(self._names.clear, directory)
            except NotFound as error:
                if error.code != "ENOENT":
                    raise
                continue
            pending.append((directory, rounds + 1))
            pending.extend((name, 0) for name in below)

    async def protected(self, files: Sequence[str]) -> Sequence[bool]:
        """See :func:`proxy.remotes.wrapper.protected_of`; opened for writing, not written."""
        found: deque[bool] = deque()
        for first in range(0, len(files), self.files_per_hop):
            some = files[first : first + self.files_per_hop]
            found.extend(await self.step(self._protected, some))
        return tuple(found)

    def _protected(self, files: Sequence[str]) -> Sequence[bool]:
        return tuple(map(self.is_protected, files))

    async def walk(self, path: str) -> AsyncIterator[tuple[str, FileStat]]:
        """Files only, each directory in one step.  What appears or vanishes below ``path``
        meanwhile may or may not be seen; any other failure is raised, never skipped."""
        top = paths.normalise(path)
        pending = [top]
        while pending:
            directory = pending.pop()
            try:
                found = await self.step(self._names.list_with_stat, directory, looks=True)
            except NotFound as error:
                if directory == top or error.code != "ENOENT":
                    raise
                continue
            below: deque[str] = deque()  # ``list`` is a method here
            for name, status in found:
                full = paths.join(directory, name)
                if status.is_dir:
                    below.appendleft(full)
                else:
                    yield full, status
            pending.extend(below)

    @contextlib.asynccontextmanager
    async def ended(self, name: str, end: Callable[[], None], *, note: str) -> AsyncIterator[None]:
        """Call ``end`` behind the block, whatever happens; ``note`` is what its failure means.

        The block's own error is the one to tell: a failure of ``end`` is then added to it.
        """
        try:
            yield
        except BaseException as error:
            try:
                await self._end_in_time(name, end)
            except Exception as undo:  # noqa: BLE001 (the first failure is the one to tell)
                error.add_note(f"and {note}: {undo}")
            raise
        else:
            await self._end_in_time(name, end)

    async def _end_in_time(self, name: str, end: Callable[[], None]) -> None:
        with undo_within(name, UNDO_SECONDS):
            await self.end(end)


def immutable(what: str, path: str) -> Refused:
    return Refused(
        f"EPERM: '{path}' cannot be {what} on an immutable remote",
        code="EPERM",
        data={"path": path},
    )


def refuses_change(opening: Callable[[], object]) -> bool:
    """Whether a file cannot be opened for writing because of what it is allowed to."""
    try:
        opening()
    except Refused as error:
        return error.code in ("EPERM", "EACCES")
    except ProxyError:
        return False
    return False


class _NewFile(Protocol):
    temporary_path: str

    def write(self, data: bytes | memoryview) -> None: ...
    def sync(self) -> None: ...
    def publish(self) -> None: ...


class _Files(Protocol):
    def write(self, path: str, data: bytes | memoryview) -> None: ...
    def sync(self) -> None: ...


class Writer:
    """See :class:`proxy.remotes.interface.FileWriter`; ``run`` calls in a thread."""

    def __init__(self, run: Callable[..., Awaitable[Any]], file: _NewFile) -> None:
        self._run = run
        self._file = file
        self.temporary_path = file.temporary_path

    async def write(self, data: bytes | memoryview) -> None:
        await self._run(self._file.write, data)

    async def commit(self) -> None:
        await self._run(self._file.sync)
        # a cancel that came while the bytes were made durable, which may be long, is heard here
        await self._run(self._file.publish)


class WrittenTogether:
    """See :class:`proxy.remotes.interface.Batch`; ``run`` calls in a thread."""

    def __init__(self, run: Callable[..., Awaitable[Any]], files: _Files) -> None:
        self._run = run
        self._files = files

    async def write(self, path: str, data: bytes | memoryview) -> None:
        await self._run(self._files.write, path, data)

    async def commit(self) -> None:
        await self._run(self._files.sync)
