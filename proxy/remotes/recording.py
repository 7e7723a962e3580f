"""Records what was done to a remote, in order, to build what a crash would have left.

A crash test records a run, then recovers from every state that a crash during it could
leave, and checks its invariants there::

    recording = Recording(remote)
    await run(recording)
    for label, apply in crash_states(recording.changes):
        apply(directory)        # whatever the recovery before did there is undone
        await recover(directory)
        check(directory, label)

States follow what :mod:`proxy.remotes.interface` promises, no more: see :func:`crash_states`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import trio

from proxy.errors import NotFound
from proxy.remotes import paths
from proxy.remotes.images import Change, Copy, Image, State
from proxy.remotes.wrapper import Operation, Wrapper

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    from proxy.remotes.interface import Remote

__all__ = ["Change", "Recording", "crash_states", "replay"]

T = TypeVar("T")


class Recording(Wrapper):
    """``changes`` in the order in which they ended; failed operations are left out.

    It belongs right around the storage.  Faults go around *it*: what they let happen, or
    happen in part, is then recorded as it happened.  ``rmtree`` is recorded as the single
    removals it consists of, ``rename_all`` as its renames, also when it fails half-way.  Not
    recorded are locks' mtimes and records, temporary files inside of ``write_file``, and what
    other programs do.  Equal contents are kept in memory once.
    """

    def __init__(self, inner: Remote) -> None:
        super().__init__(inner)
        self.changes: list[Change] = []
        self._contents: dict[bytes, bytes] = {}
        self._temporary: set[str] = set()
        self._batches: dict[object, list[str]] = {}

    async def around(self, operation: Operation, run: Callable[[], Awaitable[T]]) -> T:
        removed = await self._tree(operation.path) if operation.verb == "rmtree" else []
        present = operation.verb not in ("unlink", "rmdir") or await self._exists(operation.path)
        try:
            result = await run()
        except BaseException:
            if operation.verb == "rename_all":
                with trio.CancelScope(shield=True):
                    await self._record_half(operation)
            raise
        if removed:
            self.changes.extend(removed)
        elif present:
            self._record(operation, result)
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

    def _record(self, operation: Operation, result: object) -> None:
        path = paths.normalise(operation.path)
        target = None if operation.target is None else paths.normalise(operation.target)
        match operation.verb:
            case "write_file":
                self.changes.append(Change("put", path, data=self._data(operation)))
            case "rename":
                self.changes.append(Change("rename", path, target))
            case "rename_all":
                missing = cast("Sequence[int]", result)
                self._record_renames(operation.pairs, frozenset(missing))
            case "unlink" | "rmdir":
                self.changes.append(Change(operation.verb, path))
            case "mktree":
                self.changes.append(Change("mkdir", path))
            case "lock.held":
                self.changes.append(Change("mkdir", f"{path}.lock"))
            case "lock.release":
                self.changes.append(Change("rmdir", f"{path}.lock"))
            case verb if verb.startswith("create."):
                self._record_create(operation, path, target or _temporary_path(result))
            case verb if verb.startswith("edit."):
                self._record_edit(operation, path)
            case verb if verb.startswith("batch."):
                self._record_batch(operation, path)
            case _:
                pass

    def _record_create(self, operation: Operation, path: str, temporary: str) -> None:
        match operation.verb:
            case "create.open":
                self._temporary.add(temporary)
                self.changes.append(Change("append", temporary, durable=False))
            case "create.write":
                data = self._data(operation)
                self.changes.append(Change("append", temporary, data=data, durable=False))
            case "create.commit":
                self._temporary.discard(temporary)
                if temporary == path:
                    self.changes.append(Change("sync", "", files=(path,), names=(path,)))
                else:
                    self.changes.append(Change("sync", "", files=(temporary,)))
                    self.changes.append(Change("rename", temporary, path))
            case "create.close" if temporary in self._temporary:
                self._temporary.discard(temporary)
                self.changes.append(Change("unlink", temporary))
            case _:
                pass

    def _record_edit(self, operation: Operation, path: str) -> None:
        offset = operation.offset
        match operation.verb:
            case "edit.write_at":
                data = self._data(operation)
                self.changes.append(Change("write", path, data=data, offset=offset, durable=False))
            case "edit.truncate":
                self.changes.append(Change("truncate", path, offset=offset, durable=False))
            case "edit.sync":
                self.changes.append(Change("sync", "", files=(path,)))
            case _:
                pass

    def _record_batch(self, operation: Operation, path: str) -> None:
        match operation.verb:
            case "batch.write":
                self._batches.setdefault(operation.batch, []).append(path)
                data = self._data(operation)
                self.changes.append(Change("put", path, data=data, durable=False))
            case "batch.commit":
                written = tuple(dict.fromkeys(self._batches.pop(operation.batch, [])))
                self.changes.append(Change("sync", "", files=written, names=written))
            case _:
                pass

    def _record_renames(
        self, pairs: Sequence[tuple[str, str]], left_out: frozenset[int], *, durable: bool = True
    ) -> None:
        names: list[str] = []
        for position, pair in enumerate(pairs):
            if position not in left_out:
                old, new = map(paths.normalise, pair)
                self.changes.append(Change("rename", old, new, durable=False))
                names += (old, new)
        if names and durable:
            self.changes.append(Change("sync", "", names=tuple(dict.fromkeys(names))))

    async def _record_half(self, operation: Operation) -> None:
        """What a failed ``rename_all`` did, as far as no name is in two of its pairs.

        An image ignores those that were missing before.
        """
        still = [
            position for position, (old, _) in enumerate(operation.pairs) if await self._exists(old)
        ]
        self._record_renames(operation.pairs, frozenset(still), durable=False)

    def _data(self, operation: Operation) -> bytes:
        data = bytes(operation.data or b"")
        return self._contents.setdefault(data, data)


def _temporary_path(result: object) -> str:
    path = getattr(result, "temporary_path", "")
    assert isinstance(path, str)
    return paths.normalise(path)


class _Run:
    """A recording played step by step, with its last write that a crash may tear."""

    def __init__(self, start: Image) -> None:
        self.image = start
        self._before: Image | None = None
        self._since: list[Change] = []
        self._number = -1

    def step(self, change: Change) -> None:
        if change.is_write:
            self._before, self._since = self.image.copy(), []
        self._since.append(change)
        self.image.apply(change)
        if change.is_write:
            self._number = self.image.names[change.path]

    @property
    def torn_size(self) -> int | None:
        """Bytes of the last write that is not synced yet, ``None`` when there is none."""
        if self._before is None or self._number not in self.image.names.values():
            return None
        return len(self._since[0].data) if self.image.is_unsynced(self._number) else None

    def torn(self, size: int) -> State:
        """Everything happened, but of that write only the first ``size`` bytes."""
        assert self._before is not None, "nothing to tear"
        image = self._before.copy()
        first, *others = self._since
        for change in (first.torn(size), *others):
            image.apply(change)
        return image.everything()

    def only_last(self) -> State | None:
        """All that a crash may lose is lost but the last change: disks reorder."""
        change = self._since[-1] if self._since else None
        if change is None or change.durable or change.kind == "append":
            return None
        image = self.image.lose()
        if change.kind != "put" and change.path not in image.names:
            return None
        if (change.target or change.path) in image.directories:  # that goes was lost too
            return None
        image.apply(change)
        return image.everything()

    def states(self) -> Iterator[tuple[str, State]]:
        yield "nothing lost", self.image.everything()
        yield "unsynced lost", self.image.after_power_loss("missing")
        yield "unsynced lost, names kept", self.image.after_power_loss("empty")
        size = self.torn_size or 0
        for kept in sorted({0, 1, size // 2}):
            if kept < size:
                yield f"last write torn at {kept} of {size}", self.torn(kept)
        only_last = self.only_last()
        if only_last is not None:
            yield "unsynced lost but the last change", only_last


def crash_states(
    changes: Sequence[Change], *, start: Path | None = None
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What a crash after any number of ``changes`` can leave: a label and a function each.

    ``start`` is a directory that shows the remote as it was when the recording began, without it
    the remote was empty.  The function makes a directory show the state: it writes only
    what differs from the state that it showed before, and undoes what was done there since.
    It must be called before the next state is taken.  Files it makes look an hour old.

    For each number of changes, in this order, each different state of all once:

    - nothing lost: our process died, the machine did not;
    - unsynced lost: every change that its contract did not make durable yet is undone: files
      that were never synced are missing, edits are as of the last sync, renames of a
      ``rename_all`` under way did not happen;
    - the same, names kept: files that were never synced are there, empty;
    - the last write that is not durable yet, however long ago, has 0, 1 or half of its bytes;
      nothing else is lost;
    - unsynced lost but the last change: the disk wrote in another order.
    """
    run = _Run(Image() if start is None else Image.of(start))
    copies: dict[Path, Copy] = {}
    seen: set[int] = set()

    def show(state: State, directory: Path) -> None:
        copies.setdefault(directory, Copy(directory)).show(state)

    for count in range(len(changes) + 1):
        when = f"after {count} of {len(changes)}"
        if count:
            run.step(changes[count - 1])
            when += f", {changes[count - 1]}"
        for what, state in run.states():
            if state.fingerprint not in seen:
                seen.add(state.fingerprint)
                yield f"{when}: {what}", partial(show, state)


def replay(
    changes: Sequence[Change],
    directory: Path,
    *,
    lose_unsynced: bool = False,
    keep_names: bool = True,
    torn: int | None = None,
) -> None:
    """Do all of ``changes`` to what ``directory`` holds; it is made when missing.

    With ``lose_unsynced`` what is not durable at the end is lost; files that were never synced
    are then empty, or missing without ``keep_names``.  With ``torn`` the last write that is not
    durable at the end has only its first so many bytes.  :func:`crash_states` does this for
    every beginning of a recording.
    """
    assert not (lose_unsynced and torn is not None), "what is lost cannot be torn"
    run = _Run(Image.of(directory))
    for change in changes:
        run.step(change)
    if lose_unsynced:
        state = run.image.after_power_loss("empty" if keep_names else "missing")
    elif torn is not None and run.torn_size is not None:
        state = run.torn(torn)
    else:
        state = run.image.everything()
    Copy(directory).show(state)
