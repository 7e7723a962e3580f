"""Files on a share that are open for longer than one call.  Blocking, as the share itself."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from proxy.errors import Conflict, Corrupt, NotFound, ProxyError, Refused, Unreachable
from proxy.remotes import paths
from proxy.remotes.posix import split
from proxy.remotes.smb import status, wire
from proxy.remotes.smb.connection import FLUSH_SECONDS
from proxy.remotes.smb.share import let_go, read_into, write_all
from proxy.remotes.smb.status import StatusError, from_status, translated
from proxy.remotes.smb.wire import Access, Disposition

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from proxy.remotes.smb.connection import Link, Pending
    from proxy.remotes.smb.share import Share

_AHEAD: Final = 3
"""Requests that a sequential reader has on their way beyond what it was asked for."""
_SMALL: Final = 1024 * 1024
"""Bytes up to which a file is made, written, flushed and closed in one round trip."""


def write_whole(
    share: Share, path: str, data: bytes | memoryview, *, exclusive: bool, in_place: bool
) -> None:
    """The whole life of a :class:`NewFile`, with nothing left of it on failure."""
    file = NewFile(share, path, exclusive=exclusive, in_place=in_place)
    try:
        file.write_small(data)
        file.publish()
    finally:
        file.discard()


class NewFile:
    """A file from its first byte to its final name.  For one thread at a time.

    ``in_place`` is for remotes whose files cannot be renamed.  :meth:`discard` may be called at any
    time, more than once.  A lost connection loses the file: its bytes may be anything.
    """

    def __init__(self, share: Share, path: str, *, exclusive: bool, in_place: bool) -> None:
        split(path)
        self.path = paths.normalise(path)
        share.name(self.path)
        self.temporary_path = self.path
        self._share = share
        self._exclusive = exclusive
        self._in_place = in_place
        self._handle: tuple[Link, bytes] | None = None
        self._size = 0
        self._exists = False
        self._synced = False

    def open(self) -> None:
        if self._exclusive and not self._in_place:
            self._refuse_taken()
        self._made(self._open_at)

    def _refuse_taken(self) -> None:
        """Said early, before a day of transfer; :meth:`publish` is what decides."""
        with contextlib.suppress(NotFound):
            self._share.stat(self.path)
            raise from_status(status.NAME_COLLISION, "open", self.path)

    def _made(self, make: object) -> None:
        """Call ``make`` with free names until one is, making missing directories once."""
        assert callable(make)
        milliseconds = time.time_ns() // 1_000_000
        made_directories = False
        with self._share.translated("open", self.path):
            while True:
                name = self.path
                if not self._in_place:
                    hidden = paths.temporary_name(paths.name(self.path), milliseconds)
                    name = paths.join(paths.parent(self.path), hidden)
                try:
                    make(name)
                except StatusError as error:
                    if error.status == status.NAME_COLLISION and not self._in_place:
                        milliseconds += 1
                    elif error.status == status.PATH_NOT_FOUND and not made_directories:
                        made_directories = True
                        self._share.mktree(paths.parent(self.path))
                    else:
                        raise
                else:
                    return

    def _open_at(self, name: str) -> None:
        link, created = self._share.opened(name, Access.WRITE | Access.DELETE, Disposition.CREATE)
        self._handle = (link, created.file_id)
        self._exists, self.temporary_path = True, name

    def write_small(self, data: bytes | memoryview) -> None:
        """Open, write and sync; of a small file in one round trip."""
        view = memoryview(data).cast("B")
        if len(view) > _SMALL or not len(view):
            self.open()
            self.write(view)
            self.sync()
            return
        if self._exclusive and not self._in_place:
            self._refuse_taken()

        def make(name: str) -> None:
            link = self._share.link()
            message = self._share.creation(name, Access.WRITE | Access.DELETE, Disposition.CREATE)
            self.temporary_path, self._exists = name, True  # from here on it may be there
            try:
                answers = link.compound(
                    message,
                    wire.write(0, view),
                    wire.flush(),
                    wire.close(),
                    seconds=FLUSH_SECONDS,
                )
            except StatusError as error:
                if error.step == 0:
                    self._exists = False
                raise
            if wire.parse_written(answers[1]) != len(view):
                raise ValueError("a part only was written")
            self._size = len(view)
            self._check_size(answers[3])

        if len(view) > self._share.link().max_write:
            self.open()
            self.write(view)
            self.sync()
            return
        self._made(make)
        self._synced = True

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``."""
        link, file_id = self._opened()
        self._synced = False
        view = memoryview(data).cast("B")
        with translated("write", self.path):
            write_all(link, file_id, self._size, view, self._share.write_size)
        self._size += len(view)

    def _opened(self) -> tuple[Link, bytes]:
        assert self._handle is not None, "not open"
        return self._handle

    def sync(self) -> None:
        """Make the bytes durable on the server and see that the file has them all."""
        link, file_id = self._opened()
        self._handle = None  # for good: after a failed flush nothing is known of its bytes
        with translated("fsync", self.path):
            try:
                link.call(wire.flush(file_id), seconds=FLUSH_SECONDS)
            except StatusError:
                let_go(link, file_id)
                raise
            self._check_size(link.call(wire.close(file_id)))
        self._synced = True

    def _check_size(self, answer: wire.Body) -> None:
        closed = wire.parse_closed(answer)
        size = closed.size if closed is not None else self._share.stat(self.temporary_path).size
        if size != self._size:
            raise Corrupt(
                f"'{self.path}' has {size} bytes after {self._size} were written",
                data={"path": self.path, "size": size, "expected": self._size},
            )

    def publish(self) -> None:
        """Give the file its final name, durably; only after :meth:`sync`."""
        assert self._synced, "published before its bytes are durable"
        if self._in_place:
            self._exists = False
            self._share.sync_directory(paths.parent(self.path))
            return
        names = self._share.names
        names.rename_only(self.temporary_path, self.path, replace=not self._exclusive)
        self._exists = False  # no longer ours to remove
        names.sync_directory(paths.parent(self.path))

    def discard(self) -> None:
        """Close, and unlink what was not published."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            let_go(*handle)
        if self._exists:
            try:
                self._share.remove(self.temporary_path)
            except NotFound as error:
                if error.code != "ENOENT":
                    raise
            self._exists = False


class OpenedFile:
    """A file that is read; on a lost connection it is opened again, if it is still the same.

    :meth:`read_on` is for one caller at a time, :meth:`read_at` for many.
    """

    def __init__(self, share: Share, path: str) -> None:
        self.path = paths.normalise(path)
        self._share = share
        self._mutex = threading.Lock()
        self._closed = False
        self._ahead: deque[tuple[int, int, Pending]] = deque()
        self._link, created = self._open()
        self._file_id = created.file_id
        self._modified = created.modified
        self.size = created.size

    def _open(self) -> tuple[Link, wire.Created]:
        with self._share.translated("open", self.path):
            split(self.path)
            return self._share.opened(self.path, Access.READ)

    def _handle(self) -> tuple[Link, bytes]:
        with self._mutex:
            if self._closed:
                raise Refused(f"EBADF: closed already, '{self.path}'", code="EBADF")
            if self._link.is_lost:
                self._ahead.clear()
                link, created = self._open()
                if (created.size, created.modified) != (self.size, self._modified):
                    let_go(link, created.file_id)
                    raise Conflict(
                        f"ESTALE: '{self.path}' changed while the connection was lost",
                        code="ESTALE",
                        data={"path": self.path},
                    )
                self._link, self._file_id = link, created.file_id
            return self._link, self._file_id

    def read_at(self, offset: int, buffer: memoryview) -> int:
        link, file_id = self._handle()
        with translated("read", self.path):
            return read_into(link, file_id, offset, buffer, self._share.read_size)

    def read_on(self, position: int, buffer: memoryview) -> int:
        """As :meth:`read_at`, and ask for what comes behind it already."""
        link, file_id = self._handle()
        length = min(self._share.read_size, link.max_read)
        filled = 0
        with translated("read", self.path):
            while filled < len(buffer):
                here = position + filled
                if self._ahead and self._ahead[0][0] != here:
                    self._forget_ahead(link)
                self._ask(link, file_id, here, length, here + len(buffer) - filled)
                if not self._ahead or self._ahead[0][1] > len(buffer) - filled:
                    # the end, or a piece that does not fit: read what is missing by itself
                    self._forget_ahead(link)
                    filled += read_into(link, file_id, here, buffer[filled:], self._share.read_size)
                    break
                _, wanted, request = self._ahead.popleft()
                data = self._taken(link, request)
                if len(data) > wanted:
                    raise ValueError("more bytes than were asked for")
                buffer[filled : filled + len(data)] = data
                filled += len(data)
                if len(data) < wanted:
                    self._forget_ahead(link)
                    filled += read_into(
                        link,
                        file_id,
                        position + filled,
                        buffer[filled:],
                        self._share.read_size,
                    )
                    break
        return filled

    def _ask(self, link: Link, file_id: bytes, here: int, length: int, upto: int) -> None:
        start = here
        if self._ahead:
            start = self._ahead[-1][0] + self._ahead[-1][1]
        end = min(self.size, upto + _AHEAD * length)
        while start < end and len(self._ahead) <= _AHEAD:
            wanted = min(length, self.size - start)
            request = link.start(wire.read(start, wanted, file_id))[0]
            self._ahead.append((start, wanted, request))
            start += wanted

    @staticmethod
    def _taken(link: Link, request: Pending) -> memoryview:
        try:
            return wire.parse_data(link.finish(request))
        except StatusError as error:
            if error.status == status.END_OF_FILE:
                return memoryview(b"")
            raise

    def _forget_ahead(self, link: Link) -> None:
        while self._ahead:
            with contextlib.suppress(StatusError):
                link.finish(self._ahead.popleft()[2])

    def close(self) -> None:
        """Idempotent."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(Unreachable, ValueError):
                self._forget_ahead(self._link)
                let_go(self._link, self._file_id)


class EditedFile:
    """An open file that is read and written at any place; for one task at a time.

    A lost connection ends it when bytes were written since the last sync: whether the server
    still has them, nobody can tell.
    """

    def __init__(self, share: Share, path: str) -> None:
        self.path = paths.normalise(path)
        self._share = share
        self._mutex = threading.Lock()
        self._lost: ProxyError | None = None
        self._is_dirty = False
        self._closed = False
        self._link, self._file_id, self.size = self._open()

    def _open(self) -> tuple[Link, bytes, int]:
        with self._share.translated("open", self.path):
            split(self.path)
            link, created = self._share.opened(self.path, Access.READ | Access.WRITE)
        return link, created.file_id, created.size

    @contextlib.contextmanager
    def _opened(self, doing: str) -> Iterator[tuple[Link, bytes]]:
        with self._mutex, translated(doing, self.path):
            if self._closed:
                raise Refused(f"EBADF: closed already, '{self.path}'", code="EBADF")
            if self._link.is_lost:
                if self._is_dirty:
                    self._lost = self._lost or _lost(self.path)
                    raise self._lost
                link, file_id, size = self._open()
                if size != self.size:
                    let_go(link, file_id)
                    raise Conflict(
                        f"ESTALE: '{self.path}' changed while the connection was lost",
                        code="ESTALE",
                        data={"path": self.path},
                    )
                self._link, self._file_id = link, file_id
            yield self._link, self._file_id

    def read_into(self, offset: int, buffer: memoryview) -> int:
        with self._opened("read") as (link, file_id):
            return read_into(link, file_id, offset, buffer, self._share.read_size)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        with self._opened("write") as (link, file_id):
            self._is_dirty = True
            write_all(link, file_id, offset, view, self._share.write_size)
            if len(view):
                self.size = max(self.size, offset + len(view))

    def truncate(self, size: int) -> None:
        with self._opened("truncate") as (link, file_id):
            self._is_dirty = True
            link.call(wire.set_size(size, file_id))
            self.size = size

    def sync(self) -> None:
        """Fails for good: what a server lost in one flush the next one would call durable."""
        with self._opened("fsync") as (link, file_id):
            if self._lost is not None:
                raise self._lost
            try:
                link.call(wire.flush(file_id), seconds=FLUSH_SECONDS)
            except (StatusError, Unreachable):
                self._lost = _lost(self.path)
                raise
            self._is_dirty = False

    def close(self) -> None:
        """Idempotent."""
        with self._mutex:
            if not self._closed:
                self._closed = True
                let_go(self._link, self._file_id)


def _lost(path: str) -> Refused:
    return Refused(
        f"EIO: '{path}' may have lost bytes that were written since its last sync: what it holds "
        "is not known",
        code="EIO",
        data={"path": path},
    )


class Files:
    """Many new files on their way to be durable.  Thread-safe.

    A share knows no sync of everything: each file is flushed when it is written, in the same
    round trip, and its directory by :meth:`sync`.
    """

    def __init__(self, share: Share, *, exclusive: bool) -> None:
        self._share = share
        self._exclusive = exclusive
        self._mutex = threading.Lock()
        self._directories: set[str] = set()
        self._lost: ProxyError | None = None
        self._is_closed = False

    def write(self, path: str, data: bytes | memoryview) -> None:
        above, _ = split(path)
        if self._is_closed:
            raise Refused(f"EBADF: closed already, '{path}'", code="EBADF", data={"path": path})
        with self._mutex:  # before the name is made: a sync meanwhile must not miss it
            self._directories.add(above)
        view = memoryview(data).cast("B")
        with self._share.translated("write", path):
            try:
                self._write(path, view)
            except StatusError as error:
                if error.status != status.PATH_NOT_FOUND:
                    raise
                self._share.mktree(above)
                self._write(path, view)

    def _write(self, path: str, data: memoryview) -> None:
        disposition = Disposition.CREATE if self._exclusive else Disposition.OVERWRITE_OR_CREATE
        link = self._share.link()
        message = self._share.creation(path, Access.WRITE, disposition)
        if 0 < len(data) <= min(_SMALL, link.max_write):
            answers = link.compound(
                message, wire.write(0, data), wire.flush(), wire.close(), seconds=FLUSH_SECONDS
            )
            opened = wire.parse_created(answers[0])
            written = wire.parse_written(answers[1])
            closed = wire.parse_closed(answers[3])
        else:
            opened = wire.parse_created(link.call(message))
            written = len(data)
            closed = None
            try:
                if not opened.is_link:
                    write_all(link, opened.file_id, 0, data, self._share.write_size)
                    link.call(wire.flush(opened.file_id), seconds=FLUSH_SECONDS)
            except BaseException:
                let_go(link, opened.file_id)
                raise
            closed = wire.parse_closed(link.call(wire.close(opened.file_id)))
        if opened.is_link:
            raise StatusError(status.STOPPED_ON_SYMLINK)
        if written != len(data) or (closed is not None and closed.size != len(data)):
            raise Corrupt(
                f"'{path}' has not the {len(data)} bytes that were written",
                data={"path": path, "expected": len(data)},
            )

    def sync(self) -> None:
        """Make durable what was written by calls that have returned; fails for good."""
        with self._mutex:
            if self._is_closed:
                raise Refused("EBADF: closed already", code="EBADF")
            if self._lost is not None:
                raise self._lost
            directories, self._directories = sorted(self._directories), set()
        try:
            for path in directories:
                self._share.sync_directory(path)
        except ProxyError as error:
            self._lost = error
            raise

    def close(self) -> None:
        self._is_closed = True


class Renames:
    """Renames, done in order, whose directories are synced together.  For one thread at a time."""

    def __init__(self, share: Share) -> None:
        self.missing: list[int] = []
        """Positions of those whose old name does not exist."""
        self._share = share
        self._sources: set[str] = set()
        self._targets: set[str] = set()

    def run(self, pairs: Sequence[tuple[str, str]], first: int = 0) -> None:
        """Do ``pairs``, the first of which has position ``first``."""
        for position, (old, new) in enumerate(pairs, first):
            source, target = split(old)[0], split(new)[0]
            normal = paths.normalise(old)
            known = self._sources | self._targets
            if any(path == normal or path.startswith(f"{normal}/") for path in known):
                self.sync()  # a directory that moves takes those to be synced along
            try:
                self._share.rename_only(old, new)
            except NotFound as error:
                if error.code == "ENOENT" and error.data.get("path") == old:
                    self.missing.append(position)
                    continue
                raise
            self._sources.add(source)
            self._targets.add(target)

    def sync(self) -> None:
        """The new names first: after a crash both may exist, never neither."""
        targets, sources = self._targets, self._sources - self._targets
        self._targets, self._sources = set(), set()
        for path in (*sorted(targets), *sorted(sources)):
            self._share.sync_directory(path)
