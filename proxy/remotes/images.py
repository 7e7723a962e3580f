"""What a remote holds and what of it a crash may lose, in memory: for crash tests.

An :class:`Image` knows of each file the bytes that are there and those that are durable, and
of each name whether it is.  :class:`Change` is one step from an image to the next;
:class:`Copy` makes a directory show an image, writing only what differs.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

_PAGE: Final = 64 * 1024
_ZEROS: Final = bytes(_PAGE)
_AGE_NS: Final = 3600 * 10**9


@dataclass(frozen=True, slots=True)
class Change:
    """One effect on the remote; paths are normalised.

    - ``append`` adds ``data`` to ``path``, which it makes when missing.
    - ``put`` makes ``data`` the whole content of ``path``.
    - ``write`` puts ``data`` at ``offset`` of ``path``; ``truncate`` sets its size to ``offset``.
    - ``rename`` replaces ``target`` by ``path``; ``unlink``, ``mkdir``, ``rmdir``.
    - ``sync`` makes the bytes of ``files`` durable, and whether and what ``names`` are.

    What is not ``durable`` may be lost by a crash until a ``sync`` tells of it.
    """

    kind: Literal[
        "append", "put", "write", "truncate", "rename", "unlink", "mkdir", "rmdir", "sync"
    ]
    path: str
    target: str | None = None
    data: bytes = b""
    offset: int = 0
    files: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    durable: bool = True

    @property
    def is_write(self) -> bool:
        """It has bytes of which a crash may keep a part."""
        return self.kind in ("append", "put", "write") and not self.durable

    def torn(self, size: int) -> Change:
        """The same with only the first ``size`` bytes."""
        return replace(self, data=self.data[:size])

    def __str__(self) -> str:
        parts = [self.kind, self.path or "+".join(self.files or self.names[:2])]
        if self.target is not None:
            parts.append(f"to {self.target}")
        if self.data:
            parts.append(f"({len(self.data)} bytes at {self.offset})")
        return " ".join(parts)


class Content:
    """The bytes of a file.  Immutable; versions share the pages that are the same."""

    __slots__ = ("_fingerprint", "pages", "size")

    def __init__(self, size: int = 0, pages: Mapping[int, bytes] | None = None) -> None:
        self.size = size
        self.pages: Mapping[int, bytes] = pages or {}
        """By number, cut at the end of the file; a missing one is zeros."""
        self._fingerprint: int | None = None

    @classmethod
    def of(cls, data: bytes) -> Content:
        return cls().written(0, data)

    def written(self, offset: int, data: bytes) -> Content:
        if not data:
            return self
        pages = dict(self.pages)
        end = offset + len(data)
        for number in range(offset // _PAGE, (end - 1) // _PAGE + 1):
            first, last = max(offset, number * _PAGE), min(end, (number + 1) * _PAGE)
            part = data[first - offset : last - offset]
            if last - first < _PAGE:
                before = pages.get(number, b"")
                start = first - number * _PAGE
                part = before[:start].ljust(start, b"\0") + part + before[start + len(part) :]
            _set(pages, number, part)
        return Content(max(self.size, end), pages)

    def resized(self, size: int) -> Content:
        pages = {number: page for number, page in self.pages.items() if number * _PAGE < size}
        last = size // _PAGE
        if last in pages:
            _set(pages, last, pages[last][: size - last * _PAGE])
        return Content(size, pages)

    @property
    def fingerprint(self) -> int:
        if self._fingerprint is None:
            self._fingerprint = hash((self.size, frozenset(self.pages.items())))
        return self._fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Content) and self.size == other.size and self.pages == other.pages

    def __hash__(self) -> int:
        return self.fingerprint

    def __bytes__(self) -> bytes:
        data = bytearray(self.size)
        for number, page in self.pages.items():
            data[number * _PAGE : number * _PAGE + len(page)] = page
        return bytes(data)


def _set(pages: dict[int, bytes], number: int, page: bytes) -> None:
    """Zeros at a page's end are not kept, so that equal contents have equal pages."""
    page = page.rstrip(b"\0") if page.endswith(b"\0") else page
    if page:
        pages[number] = page
    else:
        pages.pop(number, None)


EMPTY: Final = Content()

Lost = Literal["missing", "empty"]
"""What a crash leaves of a file of which nothing was ever synced."""


@dataclass(slots=True)
class _File:
    content: Content
    synced: Content | None
    """The bytes that no crash loses; ``None``: not even the file."""


@dataclass(slots=True)
class Image:
    """Files and directories of a remote by their paths; the root is no directory of it."""

    names: dict[str, int] = field(default_factory=dict[str, int])
    durable_names: dict[str, int] = field(default_factory=dict[str, int])
    directories: set[str] = field(default_factory=set[str])
    durable_directories: set[str] = field(default_factory=set[str])
    _files: dict[int, _File] = field(default_factory=dict[int, _File])
    _count: int = 0

    @classmethod
    def of(cls, directory: Path) -> Image:
        """What ``directory`` holds, all of it durable.  Links and devices are left out."""
        image = cls()
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                image.apply(Change("mkdir", name))
            elif stat.S_ISREG(mode):
                image.apply(Change("put", name, data=path.read_bytes()))
        return image

    def copy(self) -> Image:
        return Image(
            dict(self.names),
            dict(self.durable_names),
            set(self.directories),
            set(self.durable_directories),
            {number: replace(file) for number, file in self._files.items()},
            self._count,
        )

    def apply(self, change: Change) -> None:
        match change.kind:
            case "append" | "put" | "write":
                self._write(change)
            case "truncate":
                file = self._files[self.names[change.path]]
                file.content = file.content.resized(change.offset)
            case "rename" if change.target is not None:
                self._rename(change.path, change.target, durable=change.durable)
            case "unlink":
                self.names.pop(change.path, None)
                self._settle(change.path)
            case "mkdir":
                self._make(change.path, durable=True)
            case "rmdir":
                self._remove_tree(change.path)
            case "sync":
                for path in change.files:
                    if path in self.names:
                        file = self._files[self.names[path]]
                        file.synced = file.content
                for path in change.names:
                    self._settle(path)
            case _:
                raise AssertionError(change)

    def _write(self, change: Change) -> None:
        path = change.path
        number = self.names.get(path)
        if change.kind == "put" or number is None:
            self._make(_parent(path), durable=change.durable or change.kind == "append")
            number = self._count
            self._count += 1
            self.names[path] = number
            self._files[number] = _File(EMPTY, None)
        file = self._files[number]
        at = file.content.size if change.kind == "append" else change.offset
        file.content = file.content.written(at, change.data)
        if change.durable:
            file.synced = file.content
            self._settle(path)

    def _make(self, path: str, *, durable: bool) -> None:
        for made in (path, *_above(path)) if path else ():
            self.directories.add(made)
            if durable:
                self.durable_directories.add(made)
                self.durable_names.pop(made, None)

    def _rename(self, old: str, new: str, *, durable: bool) -> None:
        if old == new or not (old in self.names or old in self.directories):
            return
        self._make(_parent(new), durable=durable)
        if old in self.names:
            self.names[new] = self.names.pop(old)
        elif old in self.directories:
            for path in [path for path in self.names if _is_within(path, old)]:
                self.names[new + path[len(old) :]] = self.names.pop(path)
            for path in [path for path in self.directories if _is_within(path, old)]:
                self.directories.discard(path)
                self.directories.add(new + path[len(old) :])
        if durable:
            self._settle(old)
            self._settle(new)

    def _settle(self, top: str) -> None:
        """Make durable what is there now under the name ``top``, or that nothing is."""
        if top in self.names or top in self.directories:
            self._make(_parent(top), durable=True)
        if top in self.directories or top in self.durable_directories:
            below = {*self.names, *self.durable_names}
            names = [path for path in below if _is_within(path, top)]
            self.durable_directories = {
                path for path in self.durable_directories if not _is_within(path, top)
            } | {path for path in self.directories if _is_within(path, top)}
        else:
            names = [top]
        for path in names:
            if path in self.names:
                self.durable_names[path] = self.names[path]
            else:
                self.durable_names.pop(path, None)

    def _remove_tree(self, top: str) -> None:
        for names in (self.names, self.durable_names):
            for path in [path for path in names if _is_within(path, top)]:
                del names[path]
        for directories in (self.directories, self.durable_directories):
            directories.difference_update({p for p in directories if _is_within(p, top)})

    def everything(self) -> State:
        """What is there when only our process died."""
        files = {path: self._files[number].content for path, number in self.names.items()}
        return State(files, frozenset(self.directories))

    def after_power_loss(self, lost: Lost = "missing") -> State:
        """What is there when all was lost that was not durable."""
        directories = set(self.durable_directories)
        files: dict[str, Content] = {}
        for path, number in self.durable_names.items():
            files[path] = self._files[number].synced or EMPTY
        if lost == "empty":
            for path, number in self.names.items():
                if self._files[number].synced is None and path not in directories:
                    above = set(_above(path))
                    if not above & files.keys():
                        files.setdefault(path, EMPTY)
                        directories |= above
        return State(files, frozenset(directories))

    def is_unsynced(self, number: int) -> bool:
        """Whether a crash may lose bytes of the file with that ``number`` in ``names``."""
        return self._files[number].synced is not self._files[number].content

    def lose(self) -> Image:
        """The image with only what is durable."""
        return Image(
            dict(self.durable_names),
            dict(self.durable_names),
            set(self.durable_directories),
            set(self.durable_directories),
            {n: _File(file.synced or EMPTY, file.synced) for n, file in self._files.items()},
            self._count,
        )


@dataclass(frozen=True, slots=True)
class State:
    """What a crash left: files and directories."""

    files: Mapping[str, Content]
    directories: frozenset[str]

    @property
    def fingerprint(self) -> int:
        """Equal for equal states, and in effect only for those."""
        files = frozenset((path, content.fingerprint) for path, content in self.files.items())
        return hash((files, self.directories))


class Copy:
    """A directory that shows one state after the other.

    Whatever is done in it between two calls of :meth:`show` is undone by the second.  Its files
    look an hour old; that they do not any more is how a change to one is noticed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mtime_ns = time.time_ns() - _AGE_NS
        self._placed: dict[str, tuple[int, Content]] = {}

    def show(self, state: State) -> None:
        directory = self._directory
        directory.mkdir(parents=True, exist_ok=True)
        self._remove_others(state)
        for name in sorted(state.directories):
            (directory / name).mkdir(exist_ok=True)
        for name, content in state.files.items():
            self._place(name, content)

    def _remove_others(self, state: State) -> None:
        pending = [self._directory]
        while pending:
            for path in list(pending.pop().iterdir()):
                name = path.relative_to(self._directory).as_posix()
                is_dir = path.is_dir() and not path.is_symlink()
                if name in (state.directories if is_dir else state.files):
                    if is_dir:
                        pending.append(path)
                elif is_dir:
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _place(self, name: str, content: Content) -> None:
        path = self._directory / name
        before = self._before(name, path)
        if before is None:
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        elif before == content:
            return
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            old = (before or EMPTY).pages
            os.ftruncate(descriptor, content.size)
            for number in _changed(old, content.pages):
                room = min(_PAGE, content.size - number * _PAGE)
                page = content.pages.get(number, b"")
                if number in old:
                    page = page.ljust(min(room, len(old[number])), b"\0")
                os.pwrite(descriptor, page[: max(room, 0)], number * _PAGE)
            os.utime(descriptor, ns=(self._mtime_ns, self._mtime_ns))
            self._placed[name] = os.fstat(descriptor).st_ino, content
        finally:
            os.close(descriptor)

    def _before(self, name: str, path: Path) -> Content | None:
        """What we put there, if nobody touched it since."""
        inode, content = self._placed.get(name, (-1, EMPTY))
        try:
            status = path.lstat()
        except FileNotFoundError:
            return None
        untouched = (inode, self._mtime_ns, content.size) == (
            status.st_ino,
            status.st_mtime_ns,
            status.st_size,
        )
        return content if untouched and stat.S_ISREG(status.st_mode) else None


def _changed(old: Mapping[int, bytes], new: Mapping[int, bytes]) -> Iterable[int]:
    for number in old.keys() | new.keys():
        if old.get(number) != new.get(number):
            yield number


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _above(path: str) -> Iterator[str]:
    """The directories on the way to ``path``, without the root."""
    while path := _parent(path):
        yield path


def _is_within(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")
